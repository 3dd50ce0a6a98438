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
from mlxlora.data.batches import Shape, choose_shapes, sample_lengths
from mlxlora.data.records import Splits, open_splits
from mlxlora.data.render import Renderer
from mlxlora.errors import ConfigError
from mlxlora.files import atomic_file, refuse_existing
from mlxlora.lora.attach import detach, new_layers, prepare_full
from mlxlora.machine import awake, token_budget
from mlxlora.quantized import QUANTIZED
from mlxlora.train.events import Event, to_json
from mlxlora.train.optim import make_optimizer
from mlxlora.train.session import Session


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
    shapes = _shapes(run, splits, renderer)
    make_optimizer(run.train)  # refuses what it cannot honour, before anything is written
    detach(base.model)
    parameters = base.parameters
    try:
        _prepare(base, run)
        session = Session(
            _out(run), run, base, splits, renderer, shapes, parameters, stop or Flag()
        )
        with _directory(session, run) as log, awake():
            for event in session.events():
                log.write(to_json(event) + "\n")
                log.flush()
                yield event
    finally:
        detach(base.model)
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


def _shapes(run: RunConfig, splits: Splits, renderer: Renderer) -> tuple[Shape, ...]:
    budget = run.train.tokens_per_microbatch
    tokens = token_budget() if budget == "auto" else int(budget)
    skip = run.data.on_bad_row == "skip"
    lengths, complete = sample_lengths(splits.train, renderer, skip)
    longest = max(lengths) if complete else run.data.max_length
    if splits.valid is not None:
        more, complete = sample_lengths(splits.valid, renderer, skip)
        longest = max(longest, *more) if complete else run.data.max_length
    return choose_shapes(lengths, longest, run.train.batch_size, tokens)


def _prepare(base: Base, run: RunConfig) -> None:
    """Put what is trained into the model: fresh low-rank layers, or all weights."""
    if run.lora.method == "full":
        if any(isinstance(module, QUANTIZED) for module in base.model.modules()):
            raise ConfigError("lora.method = 'full' cannot train quantized weights; use 'lora'")
        prepare_full(base.model)
    else:
        new_layers(base.model, run.lora, run.train.seed)
