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
from mlxlora.data.records import Splits, open_splits
from mlxlora.data.render import Renderer
from mlxlora.errors import ConfigError
from mlxlora.files import atomic_file, refuse_existing
from mlxlora.lora.attach import detach, new_layers, prepare_full
from mlxlora.machine import awake, token_budget
from mlxlora.memory import keep_freed_pages
from mlxlora.products import choose_products
from mlxlora.quantized import QUANTIZED, use_own_products
from mlxlora.train.events import Event, to_json
from mlxlora.train.optim import make_optimizer
from mlxlora.train.session import Session
from mlxlora.train.ways import choose_ways


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
        ways = choose_ways(base.model, run.train, sizes, longest, products)
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


def _prepare(base: Base, run: RunConfig) -> None:
    """Put what is trained into the model: fresh low-rank layers, or all weights."""
    if run.lora.method == "full":
        if any(isinstance(module, QUANTIZED) for module in base.model.modules()):
            raise ConfigError("lora.method = 'full' cannot train quantized weights; use 'lora'")
        prepare_full(base.model)
    else:
        new_layers(base.model, run.lora, run.train.seed)
