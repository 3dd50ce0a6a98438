"""Past runs, read from their directories: what they were to do, met and logged.

Reading never needs the base, the rows or MLX. A run may still be going on while it is read, may
have been killed, or be of another version: what cannot be understood of its log is counted.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlxlora.config import RunConfig
from mlxlora.errors import CheckpointError
from mlxlora.readers import expanded
from mlxlora.train.directory import Origin, in_use, read
from mlxlora.train.events import Done, Eval, Event, Start, Step, from_json
from mlxlora.train.places import LOG, START

Kind = TypeVar("Kind", bound=Event)


@dataclass(frozen=True)
class Run:
    """A run as its directory tells."""

    path: Path
    config: RunConfig
    origin: Origin
    events: tuple[Event, ...]
    unread: int  # lines of the log that are no events
    running: bool  # a process is at it now

    @property
    def name(self) -> str:
        return self.path.name

    def every(self, kind: type[Kind]) -> tuple[Kind, ...]:
        """The events of one kind, in the log's order."""
        return tuple(event for event in self.events if isinstance(event, kind))

    @property
    def start(self) -> Start | None:
        """What was about to be trained; None if the run did not come so far."""
        return next(iter(self.every(Start)), None)

    @property
    def done(self) -> Done | None:
        """How the run last ended; None while it goes on, or if it was killed."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Done) else None

    @property
    def updates(self) -> int:
        """Updates that were made."""
        return max((step.update for step in self.every(Step)), default=0)

    @property
    def before(self) -> float | None:
        """The validation loss before training."""
        return next((eval_.loss for eval_ in self.every(Eval) if eval_.update == 0), None)

    @property
    def best(self) -> Eval | None:
        """The best validation of the trained weights."""
        trained = [
            eval_ for eval_ in self.every(Eval) if eval_.update and math.isfinite(eval_.loss)
        ]
        return min(trained, key=lambda eval_: eval_.loss, default=None)

    @property
    def state(self) -> str:
        """ "finished", "early stop", "interrupted", "running" or "cut off" (killed)."""
        if self.running:
            return "running"
        return self.done.reason if self.done else "cut off"


def load_run(path: str | Path) -> Run:
    """Raises CheckpointError if the directory is no run, or one that was tampered with."""
    directory = expanded(path)
    config, origin = read(directory)
    events, unread = _events(directory / LOG)
    return Run(directory, config, origin, events, unread, in_use(directory))


def find_runs(path: str | Path) -> list[Path]:
    """The runs below a directory, by path; the directory itself if it is one.

    Runs are not looked for inside runs. Raises CheckpointError if there is no such directory.
    """
    directory = expanded(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory, so it holds no runs")
    return sorted(_below(directory))


def _below(directory: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(directory):
        if START in files:
            folders.clear()
            yield Path(folder)
        folders[:] = [name for name in folders if not name.startswith(".")]


def _events(path: Path) -> tuple[tuple[Event, ...], int]:
    events: list[Event] = []
    unread = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                try:
                    events.append(from_json(line))
                except ValueError:
                    unread += 1
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return tuple(events), unread
