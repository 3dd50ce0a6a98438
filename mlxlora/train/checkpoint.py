"""TrainState: everything that changes in a run, as a directory that is complete or absent.

checkpoints/step-00000100/ holds the arrays (trained weights, optimizer), the run's progress as
JSON, and the hashes of both, which are checked on load. What a run needs besides is in its
directory (train/directory.py), or a function of the seed and the update's number: the order
of the rows, dropout, the learning rate.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlxlora.data.batches import Cursor, Tally
from mlxlora.errors import CheckpointError
from mlxlora.files import (
    atomic_directory,
    hash_file,
    remove_directory,
    save_tensors,
    write_json,
)
from mlxlora.readers import read_json
from mlxlora.train.places import CHECKPOINTS, checkpoint_path, checkpoints_in

ARRAYS, PROGRESS, HASHES = "arrays.safetensors", "progress.json", "sha256.json"


@dataclass(frozen=True)
class Best:
    """The validation that the kept adapter is from."""

    loss: float = math.inf
    update: int = 0  # 0: none yet
    since: int = 0  # validations without a better one


@dataclass(frozen=True)
class Point:
    """Of a run's curve: a validation (or, without one, a save) and what was learned before it."""

    update: int
    train_loss: float  # mean per supervised token since the point before
    valid_loss: float | None


@dataclass(frozen=True)
class Progress:
    """Where a run stands, in plain values."""

    updates: int  # in all
    update: int = 0  # done
    cursor: Cursor = field(default_factory=Cursor)
    best: Best = field(default_factory=Best)
    before: float | None = None  # validation loss of the base, once measured
    validated: int = 0  # the last update whose validation is done
    tally: Tally = field(default_factory=Tally)  # of the first epoch
    train_loss: float = math.nan
    curve: tuple[Point, ...] = ()
    since: tuple[float, int] = (0.0, 0)  # the last point: loss summed, supervised tokens
    bad: int = 0  # updates in a row whose loss or gradient was not finite
    seconds: float = 0.0  # spent so far
    log_bytes: int = 0  # of log.jsonl

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Progress":
        """The inverse of dataclasses.asdict. Raises TypeError for other keys."""
        parts: dict[str, Callable[[Any], Any]] = {
            "cursor": lambda v: Cursor(**v),
            "best": lambda v: Best(**v),
            "tally": lambda v: Tally(**v),
            "curve": lambda v: tuple(Point(**point) for point in v),
            "since": tuple,
        }
        return cls(**{k: parts[k](v) if k in parts else v for k, v in value.items()})


@dataclass(frozen=True)
class TrainState:
    progress: Progress
    weights: Mapping[str, mx.array]  # trained, by name
    optimizer: Mapping[str, mx.array]  # its state, flattened

    def save(self, run: Path) -> tuple[Path, int]:
        """Write checkpoints/step-<update>/, whole or not at all: (its path, bytes)."""
        path = checkpoint_path(run, self.progress.update)
        with atomic_directory(path, replace=True) as directory:
            named = {"weights": self.weights, "optimizer": self.optimizer}
            arrays = {f"{k}/{n}": array for k, tree in named.items() for n, array in tree.items()}
            save_tensors(directory / ARRAYS, arrays, {})
            write_json(directory / PROGRESS, dataclasses.asdict(self.progress))
            hashes = {name: hash_file(directory / name) for name in (ARRAYS, PROGRESS)}
            write_json(directory / HASHES, hashes)
        return path, sum(file.stat().st_size for file in path.iterdir())

    @classmethod
    def load(cls, path: Path) -> "TrainState":
        """Raises CheckpointError, saying why, unless every byte is as it was written."""
        try:
            hashes = read_json(path / HASHES, CheckpointError)
            for name in (ARRAYS, PROGRESS):
                if hash_file(path / name) != hashes[name]:
                    raise CheckpointError(f"{path / name} is damaged: its hash differs")
            progress = Progress.from_dict(read_json(path / PROGRESS, CheckpointError))
            arrays = cast(dict[str, mx.array], mx.load(str(path / ARRAYS)))
            mx.eval(arrays)  # the file may be pruned before they are used
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        weights, optimizer = (
            {n.partition("/")[2]: a for n, a in arrays.items() if n.startswith(f"{kind}/")}
            for kind in ("weights", "optimizer")
        )
        return cls(progress, weights, optimizer)


def newest(run: Path) -> tuple[TrainState | None, list[str]]:
    """(the newest checkpoint that is whole, what is wrong with those after it).

    None if there are no checkpoints. Raises CheckpointError if there are, all of them damaged.
    """
    faults: list[str] = []
    for path in checkpoints_in(run).values():
        try:
            return TrainState.load(path), faults
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise CheckpointError(
            f"no checkpoint of {run} is whole:\n{listed}\n"
            f"Remove {run / CHECKPOINTS} to train this run from its beginning."
        )
    return None, faults


def prune(run: Path, keep: int, best: int) -> None:
    """Remove all but the newest keep checkpoints and the one of update best."""
    for update, path in list(checkpoints_in(run).items())[keep:]:
        if update != best:
            remove_directory(path)
