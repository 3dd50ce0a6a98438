"""How good is it: loss and perplexity over a file, exact match of greedy answers.

Base and adapters are measured on the same rows with the same mask, so figures compare.
"""

import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxlora.base import Base
from mlxlora.config import DataConfig
from mlxlora.data.batches import sample_sizes
from mlxlora.data.formats import Record
from mlxlora.data.layout import choose_layout
from mlxlora.data.records import Rows, open_file
from mlxlora.data.render import Renderer
from mlxlora.errors import DataError
from mlxlora.generate import answer_all, chat_tokens, prompt_tokens
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach
from mlxlora.machine import compiles, token_budget
from mlxlora.readers import expanded
from mlxlora.train.events import perplexity
from mlxlora.train.forward import Forward
from mlxlora.train.validate import Validator, batches_of

ROWS_PER_BATCH = 8


@dataclass(frozen=True)
class Answer:
    """One generated answer beside the row's own."""

    prompt: str
    wanted: str
    got: str

    @property
    def exact(self) -> bool:
        return self.wanted.strip() == self.got.strip()


@dataclass(frozen=True)
class Result:
    """One model's figures. exact_match is a share, None unless answers were generated."""

    name: str
    loss: float
    perplexity: float
    tokens: int  # supervised
    rows: int
    exact_match: float | None = None
    answers: tuple[Answer, ...] = field(default=(), repr=False)


Progress = Callable[[str, int, int], None]  # (what, done, of)


def evaluate(
    base: Base,
    data: DataConfig,
    adapters: Sequence[tuple[str, Adapter]] = (),
    *,
    with_base: bool = False,
    generate: bool = False,
    max_tokens: int = 256,
    limit: int = 0,
    force: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> Iterator[Result]:
    """Yield a Result for each adapter (and the base: if asked for, or if there is none).

    data.path is one file, or a directory whose test.jsonl (else valid.jsonl) is used.
    limit: at most so many rows (0: all). Raises DataError, AdapterError.
    """
    rows = _rows(data, limit)
    renderer = Renderer(base.tokenizer, data)
    skip = data.on_bad_row == "skip"
    sizes, longest = sample_sizes(rows, renderer, skip)
    models: list[tuple[str, Adapter | None]] = list(adapters)
    if with_base or not adapters:
        models.insert(0, ("base", None))
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
            loss, tokens = Validator(forward)(batches_of(rows, renderer, layout.cut, skip))
            answers: tuple[Answer, ...] = ()
            if generate:
                answers = tuple(_answers(base, rows, max_tokens, name, progress))
        finally:
            detach(base.model)
        exact = sum(a.exact for a in answers) / len(answers) if answers else None
        yield Result(name, loss, perplexity(loss), tokens, len(rows), exact, answers)


def _rows(data: DataConfig, limit: int) -> Rows:
    path = expanded(data.path)
    if os.path.isdir(path):
        names = [f"{n}.jsonl{gz}" for n in ("test", "valid") for gz in ("", ".gz")]
        found = next((path / name for name in names if os.path.lexists(path / name)), None)
        if found is None:
            raise DataError(f"{path} has neither test.jsonl nor valid.jsonl; name a file")
        path = found
    rows = open_file(path, data)
    return Rows(rows.file, rows.index[:limit]) if limit else rows


def _answers(
    base: Base, rows: Rows, max_tokens: int, name: str, progress: Progress
) -> Iterator[Answer]:
    """Greedy answers to each row's last assistant turn, in the order of rows."""
    questions = [_question(base, record) for record in rows]
    got: dict[int, str] = {}
    prompts = [tokens for _, _, tokens in questions]
    for number, text in answer_all(base.model, base.tokenizer, prompts, max_tokens):
        got[number] = text
        progress(f"{name}: answers", len(got), len(questions))
    for number, (prompt, wanted, _) in enumerate(questions):
        yield Answer(prompt, wanted, got[number])


def _question(base: Base, record: Record) -> tuple[str, str, list[int]]:
    """(what is asked, the row's answer, prompt tokens). Raises DataError for plain text."""
    if record.kind == "text":
        raise DataError("--generate needs rows with an answer; rows of {'text'} have none")
    last = max(i for i, m in enumerate(record.messages) if m["role"] == "assistant")
    before = record.messages[:last]
    asked = before[-1]["content"] if before else ""
    if not base.tokenizer.has_chat_template:
        tokens = prompt_tokens(base.tokenizer, asked, raw=True)
    else:
        tokens = chat_tokens(base.tokenizer, before, record.tools and list(record.tools))
    return asked, record.messages[last]["content"], tokens


class _Callable(types.ModuleType):
    """mlxlora.evaluate is this module and, as the library promises, a function too."""

    def __call__(self, *args: Any, **options: Any) -> Iterator[Result]:
        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Callable
