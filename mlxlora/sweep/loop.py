"""sweep(plan): variants of a run one after another over one loaded base, as a stream of news.

Each variant is a run in a directory of its own, so it can be resumed, reported and compared like
any other. At a rung it is stopped as Ctrl-C would stop it, one update after the validation that
counts, in the state that it later goes on from bit for bit. What was done is read from the
variants' logs: a sweep that was killed anywhere goes on from there.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event as Flag
from typing import Any

from mlxlora.base import Base, load
from mlxlora.config import RunConfig
from mlxlora.data.records import open_splits
from mlxlora.errors import ConfigError, MlxLoraError, ModelError, TrainError
from mlxlora.files import refuse_existing
from mlxlora.runs import Run, load_run
from mlxlora.sweep.board import SWEEP, Board, Standing, check_same, read, write
from mlxlora.sweep.grid import Variant, faults_of, refuse
from mlxlora.sweep.halving import kept, rank, target
from mlxlora.train.directory import locked
from mlxlora.train.events import Done, Eval, Event, Start, Step
from mlxlora.train.forecast import refuse_what_cannot_fit
from mlxlora.train.loop import check, resume, train
from mlxlora.train.places import START

OWN_FAULTS = (TrainError, ConfigError, ModelError)  # of a variant; what else fails fails for all


@dataclass(frozen=True)
class Plan:
    """What is to be tried; checked, nothing loaded."""

    directory: Path
    recipe: str
    config: RunConfig  # without the grid
    grid: Mapping[str, list[Any]]
    variants: tuple[Variant, ...]
    keep: float
    rungs: tuple[float, ...]

    def board(self) -> Board:
        """The board of the beginning."""
        config = self.config.to_dict()
        del config["out"]
        return Board(
            self.recipe,
            self.grid,
            config,
            self.keep,
            self.rungs,
            tuple(Standing(one.name, one.name, one.overrides) for one in self.variants),
        )


@dataclass(frozen=True)
class News:
    """Something happened: how all stand now, and what it was."""

    board: Board
    name: str = ""  # of the variant that it is about
    event: Event | None = None  # of its run
    rung: int = 0  # that was decided, from 1
    dropped: tuple[str, ...] = ()  # by it
    end: str = ""  # of the sweep: "finished" or "interrupted"


def sweep(
    plan: Plan,
    base: Base | None = None,
    *,
    stop: Flag | None = None,
    trust_remote_code: bool = False,
) -> Iterator[News]:
    """Run the plan, or go on with it if its directory holds this very sweep.

    Setting stop ends it after the current update. Raises ConfigError for variants that cannot be
    run or rows without validation, CheckpointError if the directory holds another sweep, and
    TrainError if every variant failed.
    """
    stop = stop or Flag()
    board = _opened(plan, trust_remote_code)
    if not board.over:
        base = base or load(plan.config.model, trust_remote_code=trust_remote_code)
        plan.directory.mkdir(parents=True, exist_ok=True)
        with locked(plan.directory):
            write(plan.directory, board)
            yield News(board)
            for news in _Sweep(plan, base, stop).run(board):
                if news.board != board and not isinstance(news.event, Step):
                    write(plan.directory, news.board)
                board = news.board
                yield news
    if not stop.is_set() or board.over:
        if board.best is None:
            reasons = "\n".join(f"  {one.name}: {one.reason}" for one in board.variants)
            raise TrainError(f"every variant failed:\n{reasons}")
        yield News(board, end="finished")
    else:
        yield News(board, end="interrupted")


def _opened(plan: Plan, trust: bool) -> Board:
    """The board to go on from. Everything is checked here, before the base is loaded."""
    board = plan.board()
    begun = (plan.directory / SWEEP).exists()
    if begun:
        earlier = read(plan.directory)
        check_same(plan.directory, earlier, board)
        board = earlier
    else:
        refuse_existing(plan.directory)
    new = [one for one in plan.variants if not (plan.directory / one.name / START).exists()]
    if begun:  # the others were let through when it began
        new = [one for one in new if board.find(one.name).state == "waiting"]
    refuse(faults_of(new, check, MlxLoraError), len(new))
    if new:
        splits = open_splits(plan.config.data, plan.config.train.seed)
        if splits.valid is None:
            raise ConfigError(
                "a sweep compares validation losses, and this data has no validation rows: add a "
                "valid.jsonl, or let data.valid_fraction of a single file be kept"
            )
        late = lambda run: _refuse_late(run, len(splits.train), plan.rungs)  # noqa: E731
        refuse(faults_of(new, late, ConfigError), len(new))
        fits = lambda run: refuse_what_cannot_fit(run, trust_remote_code=trust)  # noqa: E731
        refuse(faults_of(new, fits, ConfigError), len(new))
    return board


def _refuse_late(run: RunConfig, rows: int, rungs: Sequence[float]) -> None:
    """Raise ConfigError for a run that is not validated before its end, where it is needed."""
    updates = run.train.length(rows)
    every = run.eval.interval(updates)
    late = [share for share in rungs if target(share, updates, every) >= updates]
    if late:
        raise ConfigError(
            f"eval.every = {every} of {updates} updates: nothing is measured between "
            f"{100 * late[0]:.3g} % of a run and its end, where variants are to be compared; "
            "set eval.every=0 (ten times a run), or pass --no-halving"
        )


class _Sweep:
    """One sweep as it goes; how it stands is a Board, replaced as it goes."""

    def __init__(self, plan: Plan, base: Base, stop: Flag) -> None:
        self._plan, self._base, self._stop = plan, base, stop
        self._board = plan.board()

    def run(self, board: Board) -> Iterator[News]:
        self._board = board
        for number, share in enumerate([*self._plan.rungs, 1.0], 1):
            for variant in self._plan.variants:
                if self._stop.is_set():
                    return
                standing = self._board.find(variant.name)
                if standing.state in ("waiting", "running") and standing.rung < number:
                    yield from self._advance(variant, number, share)
            if self._stop.is_set():
                return
            if number <= len(self._plan.rungs):
                yield from self._decide(number, share)

    def _advance(self, variant: Variant, number: int, share: float) -> Iterator[News]:
        """Train one variant up to a rung, unless its log says that it came there before."""
        directory = self._directory(variant.name)
        try:
            if not self._reached(directory, share):
                yield from self._train(variant, directory, share)
        except OWN_FAULTS as error:
            yield self._put(variant.name, state="failed", reason=str(error))
            return
        if not self._stop.is_set() or self._reached(directory, share):
            run = load_run(directory)
            ended = run.done is not None and run.done.reason != "interrupted"
            yield self._put(
                variant.name,
                state="finished" if ended else "running",
                rung=number,
                updates=run.updates,
                loss=_best(run, 1.0),
                of=run.start.updates if run.start else 0,
            )

    def _train(self, variant: Variant, directory: Path, share: float) -> Iterator[News]:
        flag, length, at = Flag(), 0, 0
        if (directory / START).exists():
            events = resume(directory, self._base, stop=flag)
        else:
            events = train(variant.run, self._base, stop=flag)
        with contextlib.closing(events):  # type: ignore[type-var]
            for event in events:
                changes: dict[str, Any] = {"state": "running"}
                if isinstance(event, Start):
                    length, at = event.updates, target(share, event.updates, event.validates_every)
                    changes["of"] = length
                elif isinstance(event, Step):
                    changes["updates"] = event.update
                elif isinstance(event, Eval) and event.update:
                    changes["loss"] = min(self._loss(variant.name), rank(event.loss))
                    if at <= event.update < length:
                        flag.set()
                if not isinstance(event, Done):
                    yield self._put(variant.name, event, **changes)
                if self._stop.is_set():  # before the run looks whether it is to stop
                    flag.set()

    def _decide(self, number: int, share: float) -> Iterator[News]:
        """Drop the worse part of those that are still there."""
        board = self._board
        alive = [one.name for one in board.alive()]
        decided = any(one.state == "dropped" and one.rung == number for one in board.variants)
        if decided or not alive:
            return
        losses = {name: _best(load_run(self._directory(name)), share) for name in alive}
        chosen = kept(losses, self._plan.keep)
        dropped = tuple(
            name for name in alive if name not in chosen and board.find(name).state == "running"
        )
        for name in dropped:
            board = board.put(name, state="dropped")
        self._board = board
        yield News(board, rung=number, dropped=dropped)

    def _reached(self, directory: Path, share: float) -> bool:
        """Whether the run's log holds the validation of this rung, or its end."""
        if not (directory / START).exists():
            return False
        run = load_run(directory)
        if run.done is not None and run.done.reason != "interrupted":
            return True
        if share == 1 or run.start is None:
            return False
        at = target(share, run.start.updates, run.start.validates_every)
        return at < run.start.updates and any(e.update >= at for e in run.every(Eval))

    def _put(self, name: str, event: Event | None = None, **changes: Any) -> News:
        self._board = self._board.put(name, **changes)
        return News(self._board, name, event)

    def _loss(self, name: str) -> float:
        return rank(self._board.find(name).loss)

    def _directory(self, name: str) -> Path:
        return self._plan.directory / name


def _best(run: Run, share: float) -> float | None:
    """A run's best validation loss up to a share of it."""
    if run.start is None:
        return None
    at = target(share, run.start.updates, run.start.validates_every)
    losses = [e.loss for e in run.every(Eval) if 0 < e.update <= at and math.isfinite(e.loss)]
    return min(losses, default=None)
