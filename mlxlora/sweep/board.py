"""Where a sweep stands: sweep.json in its directory, replaced whole with every change."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from mlxlora.config import RunConfig
from mlxlora.errors import CheckpointError, ConfigError
from mlxlora.files import write_json
from mlxlora.readers import read_json
from mlxlora.sweep.halving import rank
from mlxlora.train.directory import differences

SWEEP = "sweep.json"
State = Literal["waiting", "running", "finished", "dropped", "failed"]


@dataclass(frozen=True)
class Standing:
    """A variant as it stands."""

    name: str
    run: str  # its directory, below the sweep's
    overrides: tuple[str, ...]
    state: State = "waiting"
    updates: int = 0  # made so far
    loss: float | None = None  # best validation loss so far
    rung: int = 0  # rungs that it came to
    of: int = 0  # updates of its whole run, once known
    reason: str = ""  # why it failed


@dataclass(frozen=True)
class Board:
    """The sweep: what is tried, and how each variant stands, in the order of the grid."""

    recipe: str
    grid: Mapping[str, list[Any]]
    config: Mapping[str, Any]  # the run without the grid
    keep: float
    rungs: tuple[float, ...]  # shares of a run
    variants: tuple[Standing, ...]

    def find(self, name: str) -> Standing:
        return next(one for one in self.variants if one.name == name)

    def put(self, name: str, **changes: Any) -> "Board":
        """The board with a variant changed."""
        return replace(
            self,
            variants=tuple(
                replace(one, **changes) if one.name == name else one for one in self.variants
            ),
        )

    def alive(self) -> list[Standing]:
        """Neither dropped nor failed."""
        return [one for one in self.variants if one.state not in ("dropped", "failed")]

    def ranked(self) -> list[Standing]:
        """All, best first; then the dropped, those that came further first; then the failed."""

        def place(one: Standing) -> tuple[int, int, float]:
            group = {"dropped": 1, "failed": 2}.get(one.state, 0)
            return group, -one.rung if group else 0, rank(one.loss)

        return sorted(self.variants, key=place)

    @property
    def best(self) -> Standing | None:
        """The finished variant of the lowest validation loss; of equals, the first."""
        finished = [one for one in self.variants if one.state == "finished"]
        return min(finished, key=lambda one: rank(one.loss), default=None)

    @property
    def over(self) -> bool:
        return all(one.state in ("finished", "dropped", "failed") for one in self.variants)

    def to_dict(self) -> dict[str, Any]:
        value = dataclasses.asdict(self)
        for one in value["variants"]:
            one["loss"] = one["loss"] if math.isfinite(rank(one["loss"])) else None
        return value


def write(directory: Path, board: Board) -> None:
    write_json(directory / SWEEP, board.to_dict())


def read(directory: Path) -> Board:
    """Raises CheckpointError if the file is damaged."""
    path = directory / SWEEP
    value = read_json(path, CheckpointError)
    try:
        variants = tuple(
            Standing(**{**one, "overrides": tuple(one["overrides"])}) for one in value["variants"]
        )
        config = RunConfig.from_dict(value["config"]).to_dict()
        del config["out"]
        rungs = tuple(value["rungs"])
        return Board(**{**value, "config": config, "rungs": rungs, "variants": variants})
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def check_same(directory: Path, then: Board, now: Board) -> None:
    """Raise CheckpointError, saying what changed, unless both are of the same sweep."""
    changes = differences(dict(then.config), dict(now.config))
    changes += list(_changed("--grid ", then.grid, now.grid))
    changes += list(_changed("", {"--keep": then.keep}, {"--keep": now.keep}))
    shares = [[f"{100 * share:.3g} %" for share in board.rungs] for board in (then, now)]
    changes += list(_changed("", {"rungs": shares[0]}, {"rungs": shares[1]}))
    if changes:
        raise CheckpointError(
            f"{directory} holds a sweep that began otherwise:\n"
            + "\n".join(f"  {change}" for change in changes)
            + "\nPut it back, or begin a new sweep in another directory."
        )


def _changed(label: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for key in dict.fromkeys([*then, *now]):
        old, new = (cast(Any, side.get(key, "not there")) for side in (then, now))
        if old != new:
            yield f"{label}{key}: {old} then, {new} now"
