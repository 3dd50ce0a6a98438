"""train(run) and resume(directory): a training run as a stream of events.

A run is a directory (train/directory.py) with adapter/ in it: the best by validation loss, the
last where there is no validation set. The base is never changed: when the generator ends,
however it ends, the adapter is detached.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag

import mlx.core as mx

from mlxlora.base import Base, load
from mlxlora.config import LoraConfig, RunConfig
from mlxlora.data.batches import Size, sample_sizes
from mlxlora.data.records import Splits, open_splits
from mlxlora.data.render import Renderer
from mlxlora.errors import ConfigError, ExportError, MlxLoraError
from mlxlora.files import refuse_existing, remove_directory
from mlxlora.lora.attach import detach
from mlxlora.lora.fresh import prepare
from mlxlora.machine import awake, token_budget
from mlxlora.memory import keep_freed_pages, limits
from mlxlora.products import choose_products, use_products
from mlxlora.quantized import use_own_products
from mlxlora.readers import expanded
from mlxlora.train.checkpoint import newest
from mlxlora.train.directory import (
    Origin,
    create,
    discard,
    finished,
    locked,
    read,
    rewrite,
)
from mlxlora.train.events import Event, Resumed
from mlxlora.train.forecast import refuse_what_cannot_fit
from mlxlora.train.optim import make_optimizer
from mlxlora.train.places import ADAPTER, START, checkpoint_path, checkpoints_in
from mlxlora.train.session import Job, Session
from mlxlora.train.ways import Ways, choose_ways, smaller_ways


def train(
    run: RunConfig,
    base: Base | None = None,
    *,
    stop: Flag | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Event]:
    """Train as run says, yielding events; everything is checked before the first.

    base saves loading run.model again. Setting stop ends the run after the current update, in
    a state that resume() goes on from. Raises MlxLoraError for anything wrong with the input,
    and TrainError, the last good weights saved, if the loss stops being a number.
    """
    check(run)
    splits = open_splits(run.data, run.train.seed)
    _check_against_data(run, splits)
    if base is None:
        refuse_what_cannot_fit(run, trust_remote_code=trust_remote_code)
        base = load(run.model, trust_remote_code=trust_remote_code)
    renderer = Renderer(base.tokenizer, run.data)
    make_optimizer(run.train)  # refuses what it cannot honour, before anything is written
    with _prepared(base) as parameters:
        products = choose_products(base.model, token_budget())
        prepare(base.model, run.lora, run.train.seed)
        ways = choose_ways(base.model, run.train, *_sizes(run, splits, renderer), products)
        directory = _out(run)
        create(directory, Origin.of(run, base.identity, splits, ways.to_dict()))
        job = Job(directory, run, base, splits, renderer, ways, parameters)
        with locked(directory):
            yield from _events(job, lambda: Session(job, stop or Flag()), new=True)


def resume(
    path: str | Path,
    base: Base | None = None,
    *,
    stop: Flag | None = None,
    smaller: bool = False,
    because: str = "",
    trust_remote_code: bool = False,
) -> Iterator[Event]:
    """Go on with an interrupted run from its newest whole checkpoint, as if nothing had happened.

    The result is that of an uninterrupted run, bit for bit, on the same machine with the same
    versions. smaller computes its updates in pieces of half as many tokens from now on, to save
    memory: the same updates but for rounding and what dropout draws. because, why the run was cut
    off, goes into its log. Of a run that is finished already, yields its Done again.
    Raises CheckpointError if the directory is no run, another process is at it, or the base,
    the rows or the options are not what they were.
    """
    directory = expanded(path)
    run, origin = read(directory)
    done = finished(directory)
    if done is not None:  # perhaps moved since
        last = directory / Path(done.last).name
        yield replace(done, adapter=str(directory / ADAPTER), last=str(last))
        return
    with locked(directory):
        splits = _splits_again(run, origin)
        base = base or load(origin.find(run.model), trust_remote_code=trust_remote_code)
        origin.check(base.identity, splits)
        renderer = Renderer(base.tokenizer, run.data)
        with _prepared(base) as parameters:
            use_products(base.model, origin.ways["products"])
            prepare(base.model, run.lora, run.train.seed)
            if smaller:
                sizes = _sizes(run, splits, renderer)
                ways = smaller_ways(base.model, run.train, *sizes, origin.ways)
                rewrite(directory, replace(origin, ways=ways.to_dict()))
            else:
                ways = Ways.restore(base.model, origin.ways)
            job = Job(directory, run, base, splits, renderer, ways, parameters)
            notes = [because] * bool(because) + origin.newer()
            yield from _events(job, lambda: _session_again(job, stop or Flag(), notes), new=False)


def _events(job: Job, begin: Callable[[], Session], *, new: bool) -> Iterator[Event]:
    """The session's events, each in the log before anyone sees it.

    A new run that fails before its first update, by the user's input or for want of room,
    leaves no directory behind.
    """
    session = None
    try:
        session = begin()
        with awake(), limits(job.ways.peak_bytes, job.ways.base_bytes):
            for event in session.events():
                session.log.write(event)
                yield event
    except (MlxLoraError, OSError):
        if new and (session is None or not session.progress.update):
            discard(job.directory)
        raise
    finally:
        if session is not None:
            session.log.close()


def _session_again(job: Job, stop: Flag, notes: list[str]) -> Session:
    """A session that goes on from the newest whole checkpoint; damaged ones are removed.

    The checkpoint's arrays live in the session alone: held any longer they would be memory.
    """
    state, faults = newest(job.directory)
    update = state.progress.update if state else 0
    at = checkpoint_path(job.directory, update) if state else ""
    session = Session(job, stop, state, Resumed(update, str(at), (*notes, *faults)))
    for later, path in checkpoints_in(job.directory).items():
        if later > update:
            remove_directory(path)
    return session


@contextmanager
def _prepared(base: Base) -> Iterator[int]:
    """The base ready to be trained, and the number of its weights; afterwards as it was."""
    detach(base.model)
    parameters = base.parameters
    try:
        keep_freed_pages()
        yield parameters
    finally:
        detach(base.model)
        use_own_products(base.model)
        mx.clear_cache()


def _splits_again(run: RunConfig, origin: Origin) -> Splits:
    data = replace(run.data, path=origin.find(run.data.path))
    return open_splits(data, run.train.seed)


def check(run: RunConfig) -> None:
    """Raise ConfigError or ExportError for a run that cannot start, before loading anything."""
    missing = [key for key in ("model", "out") if not getattr(run, key)]
    missing += [] if run.data.path else ["data.path"]
    if missing:
        raise ConfigError(f"not given: {', '.join(missing)}")
    if run.lora.method == "full":
        other = LoraConfig(method="full")
        given = [f"lora.{k}" for k, v in vars(run.lora).items() if v != vars(other)[k]]
        given += ["train.lora_plus_ratio"] if run.train.lora_plus_ratio != 1 else []
        if given:
            names = ", ".join(sorted(given))
            raise ConfigError(f"{names}: without meaning when every weight is trained (full)")
    out = _out(run)
    if (out / START).exists():
        raise ExportError(
            f"{out} holds a run, which is never overwritten; choose another name, or go on with "
            f"it: mlxlora resume {out}"
        )
    refuse_existing(out)


def _out(run: RunConfig) -> Path:
    return expanded(run.out)


def _check_against_data(run: RunConfig, splits: Splits) -> None:
    """Raise ConfigError for options that these rows cannot honour."""
    if splits.kind == "text" and run.data.mask == "completion":
        raise ConfigError("data.mask = 'completion': rows of {'text'} have none; use 'all'")
    if splits.valid is None and run.eval.patience:
        raise ConfigError("eval.patience needs validation rows, and this data has none")


def _sizes(run: RunConfig, splits: Splits, renderer: Renderer) -> tuple[list[Size], int]:
    """(sizes of sampled training rows, the longest row that can occur in any split)."""
    skip = run.data.on_bad_row == "skip"
    sizes, longest = sample_sizes(splits.train, renderer, skip)
    if splits.valid is not None:
        longest = max(longest, sample_sizes(splits.valid, renderer, skip)[1])
    return sizes, longest
