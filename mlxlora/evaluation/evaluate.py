"""How good is it: loss and perplexity over a file, metrics of greedy answers.

Base and adapters are measured on the same rows with the same mask, so figures compare.
"""

import os
from collections.abc import Callable, Iterator, Sequence

from mlxlora.base import Base
from mlxlora.config import DataConfig
from mlxlora.data.batches import sample_sizes
from mlxlora.data.layout import choose_layout
from mlxlora.data.records import Rows, open_file
from mlxlora.data.render import Renderer
from mlxlora.errors import ConfigError, DataError
from mlxlora.evaluation.answers import Answer, answers, questions
from mlxlora.evaluation.losses import measure
from mlxlora.evaluation.metrics import Metric, metric
from mlxlora.evaluation.results import EXACT, Result, estimated
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach
from mlxlora.machine import compiles, token_budget
from mlxlora.readers import expanded
from mlxlora.train.events import perplexity
from mlxlora.train.forward import Forward
from mlxlora.train.validate import Validator, batches_of

ROWS_PER_BATCH = 8
BASE = "base"  # its name in results

Progress = Callable[[str, int, int], None]  # (what, done, of)


def evaluate(
    base: Base,
    data: DataConfig,
    adapters: Sequence[tuple[str, Adapter]] = (),
    *,
    with_base: bool = False,
    generate: bool = False,
    metrics: Sequence[Metric | str] = (),
    max_tokens: int = 256,
    limit: int = 0,
    force: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> Iterator[Result]:
    """Yield a Result for each adapter (and the base: if asked for, or if there is none).

    data.path is one file, or a directory whose test.jsonl (else valid.jsonl) is used.
    generate asks for answers and the metric "exact"; so does naming metrics, without "exact".
    limit: at most so many rows (0: all). Raises ConfigError, DataError, AdapterError.
    """
    wanted = [metric(one) if isinstance(one, str) else one for one in metrics]
    if generate and all(one.name != EXACT for one in wanted):
        wanted.insert(0, metric(EXACT))
    rows = open_rows(data, limit)
    renderer = Renderer(base.tokenizer, data)
    skip = data.on_bad_row == "skip"
    sizes, longest = sample_sizes(rows, renderer, skip)
    asked = questions(base, rows, wanted, skip) if wanted else []
    models: list[tuple[str, Adapter | None]] = list(adapters)
    if with_base or not adapters:
        if any(name == BASE for name, _ in adapters):
            raise ConfigError(f"an adapter is named {BASE!r} like the base; name it otherwise")
        models.insert(0, (BASE, None))
    for name, adapter in models:
        detach(base.model)
        if adapter is not None:
            attach(base, adapter, force=force)
        try:
            progress(f"{name}: loss", 0, len(rows))
            forward = Forward(base.model)
            layout = choose_layout(
                sizes,
                longest,
                ROWS_PER_BATCH,
                token_budget(),
                packed=forward.packs,
                exact=not compiles(),
            )
            losses = measure(Validator(forward), batches_of(rows, renderer, layout.cut, skip))
            given: tuple[Answer, ...] = ()
            if asked:
                told = lambda done, of, name=name: progress(f"{name}: answers", done, of)  # noqa: E731
                given = answers(base, rows, asked, wanted, max_tokens, told)
        finally:
            detach(base.model)
        of_loss, estimates = estimated(losses, given)
        exact = estimates[EXACT].value if EXACT in estimates else None
        loss, tokens = losses.mean, losses.count
        yield Result(
            name,
            loss,
            perplexity(loss),
            tokens,
            len(rows),
            exact,
            given,
            loss_interval=of_loss,
            metrics=estimates,
            losses=losses,
        )


def open_rows(data: DataConfig, limit: int = 0) -> Rows:
    """The rows to measure on, at most so many (0: all)."""
    path = expanded(data.path)
    if os.path.isdir(path):
        names = [f"{n}.jsonl{gz}" for n in ("test", "valid") for gz in ("", ".gz")]
        found = next((path / name for name in names if os.path.lexists(path / name)), None)
        if found is None:
            raise DataError(f"{path} has neither test.jsonl nor valid.jsonl; name a file")
        path = found
    rows = open_file(path, data)
    return Rows(rows.file, rows.index[:limit]) if limit else rows
