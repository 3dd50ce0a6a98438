"""train(run): the whole of a training run as a stream of events.

A run is a directory: run.toml (resolved options), log.jsonl (an object per event) and
adapter/ (the best by validation loss; the last where there is no validation set). The base
is never changed: when the generator ends, however it ends, the adapter is detached.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event as Flag
from typing import TextIO

import mlx.core as mx

from mlxlora.base import Base, load
from mlxlora.config import LoraConfig, RunConfig
from mlxlora.data.batches import Size, sample_sizes
from mlxlora.data.layout import Layout, choose_layout
from mlxlora.data.records import Splits, open_splits
from mlxlora.data.render import Renderer
from mlxlora.errors import ConfigError
from mlxlora.files import atomic_file, refuse_existing
from mlxlora.lora.attach import detach, new_layers, prepare_full
from mlxlora.machine import awake, compiles, keep_freed_pages, token_budget
from mlxlora.plan import plan_memory
from mlxlora.products import choose_products
from mlxlora.quantized import QUANTIZED, use_own_products
from mlxlora.train.events import Event, to_json
from mlxlora.train.forward import Forward
from mlxlora.train.optim import make_optimizer
from mlxlora.train.packing import position_limit
from mlxlora.train.recompute import trained_blocks
from mlxlora.train.session import Session, Ways


def train(run: RunConfig, base: Base | None = None, *, stop: Flag | None = None) -> Iterator[Event]:
    """Train as run says, yielding events; everything is checked before the first.

    base saves loading run.model again. Setting stop ends the run after the current update,
    with the weights saved. Raises MlxLoraError for anything wrong with the input, and
    TrainError, the last good weights saved, if the loss stops being a number.
    """
    check(run)
    splits = open_splits(run.data, run.train.seed)
    _check_against_data(run, splits)
    base = base or load(run.model)
    renderer = Renderer(base.tokenizer, run.data)
    sizes, longest = _sizes(run, splits, renderer)
    make_optimizer(run.train)  # refuses what it cannot honour, before anything is written
    detach(base.model)
    parameters = base.parameters
    try:
        keep_freed_pages()
        products = choose_products(base.model, token_budget())
        _prepare(base, run)
        forward = Forward(base.model)
        ways = Ways(_layout(run, sizes, longest, forward), forward, products)
        session = Session(_out(run), run, base, splits, renderer, ways, parameters, stop or Flag())
        with _directory(session, run) as log, awake():
            for event in session.events():
                log.write(to_json(event) + "\n")
                log.flush()
                yield event
    finally:
        detach(base.model)
        use_own_products(base.model)
        mx.clear_cache()


def check(run: RunConfig) -> None:
    """Raise ConfigError or ExportError for a run that cannot start, before loading anything."""
    missing = [key for key in ("model", "out") if not getattr(run, key)]
    missing += [] if run.data.path else ["data.path"]
    if missing:
        raise ConfigError(f"not given: {', '.join(missing)}")
    if run.lora.method == "full":
        given = {k for k, v in vars(run.lora).items() if v != vars(LoraConfig())[k]} - {"method"}
        if given:
            names = ", ".join(f"lora.{name}" for name in sorted(given))
            raise ConfigError(f"{names}: without meaning when every weight is trained (full)")
    refuse_existing(_out(run))


def _out(run: RunConfig) -> Path:
    return Path(run.out).expanduser()


def _check_against_data(run: RunConfig, splits: Splits) -> None:
    """Raise ConfigError for options that these rows cannot honour."""
    if splits.kind == "text" and run.data.mask == "completion":
        raise ConfigError("data.mask = 'completion': rows of {'text'} have none; use 'all'")
    if splits.valid is None and run.eval.patience:
        raise ConfigError("eval.patience needs validation rows, and this data has none")


@contextmanager
def _directory(session: Session, run: RunConfig) -> Iterator[TextIO]:
    """Make the run's directory with run.toml and open its log.

    It is gone again if the run fails with nothing learned in it.
    """
    session.directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(session.directory / "run.toml") as file:
        file.write(run.to_toml().encode())
    try:
        with (session.directory / "log.jsonl").open("a", encoding="utf-8") as log:
            yield log
    except GeneratorExit:
        raise
    except BaseException:
        if session.last is None:
            shutil.rmtree(session.directory, ignore_errors=True)
        raise


def _sizes(run: RunConfig, splits: Splits, renderer: Renderer) -> tuple[list[Size], int]:
    """(sizes of sampled training rows, the longest row that can occur in any split)."""
    skip = run.data.on_bad_row == "skip"
    sizes, longest = sample_sizes(splits.train, renderer, skip)
    if splits.valid is not None:
        longest = max(longest, sample_sizes(splits.valid, renderer, skip)[1])
    return sizes, longest


def _layout(run: RunConfig, sizes: list[Size], longest: int, forward: Forward) -> Layout:
    """How updates are cut, and whether blocks are checkpointed: by what fits this machine."""
    wanted, packing = run.train.tokens_per_microbatch, run.train.packing
    if packing is True and not forward.packs:
        raise ConfigError("train.packing = true: rows of this model cannot be packed; use 'auto'")
    logits = forward.vocabulary if forward.head is None else 0
    plan = plan_memory(forward.model, trained_blocks(forward.model), logits)
    checkpointed = run.train.checkpoint_blocks
    forward.checkpoint_blocks = (
        plan.checkpoints(longest) if checkpointed == "auto" else checkpointed
    )
    tokens = plan.tokens(token_budget(), longest, forward.checkpoint_blocks)
    tokens = tokens if wanted == "auto" else int(wanted)
    packed = forward.packs and packing is not False
    limit = position_limit(forward.model) if packed else None
    return choose_layout(
        sizes,
        longest,
        run.train.batch_size,
        min(tokens, limit or tokens),
        packed=packed,
        exact=not compiles(),
    )


def _prepare(base: Base, run: RunConfig) -> None:
    """Put what is trained into the model: fresh low-rank layers, or all weights."""
    if run.lora.method == "full":
        if any(isinstance(module, QUANTIZED) for module in base.model.modules()):
            raise ConfigError("lora.method = 'full' cannot train quantized weights; use 'lora'")
        prepare_full(base.model)
    else:
        new_layers(base.model, run.lora, run.train.seed)
