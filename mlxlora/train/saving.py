"""What a run saves, and when: the adapter with where it came from, and checkpoints.

The best adapter is saved when it is found. Checkpoints come every save.every updates or, by
default, by time: so often that little is lost, so seldom that saving costs next to nothing.
"""

import math
import time
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlxlora.base import Base
from mlxlora.config import RunConfig
from mlxlora.data.records import Splits
from mlxlora.files import remove_directory
from mlxlora.lora.fresh import collect
from mlxlora.train.checkpoint import Progress, TrainState, prune
from mlxlora.train.directory import describe, versions
from mlxlora.train.events import Saved
from mlxlora.train.places import ADAPTER
from mlxlora.train.step import Stepper

# Between two checkpoints, by default:
SECONDS = 60.0  # at least
LONGEST = 900.0  # at most, however large they are
TIMES_ITS_COST = 25  # at least so many times what the last one took: 4 % of the run
BYTES_A_SECOND = 2e6  # at most, so that a night of training does not wear a disk
LAST = "last-"


class Saver:
    """Writes into the run's directory; knows what was saved last."""

    def __init__(
        self, directory: Path, run: RunConfig, base: Base, splits: Splits, rate: float
    ) -> None:
        """rate: the run's peak learning rate."""
        self._rate = rate
        self.directory, self._run, self._base, self._splits = directory, run, base, splits
        self.last: Saved | None = None  # adapter
        self.checkpointed = 0  # the update of the newest checkpoint
        self.rest = SECONDS  # from the last checkpoint to the next
        self._when = time.perf_counter()

    def due(self, update: int) -> bool:
        """Whether a checkpoint is to be saved after this update."""
        if self._run.save.every:
            return update % self._run.save.every == 0
        return time.perf_counter() - self._when > self.rest

    def checkpoint(self, progress: Progress, stepper: Stepper) -> Saved:
        """Save everything that changes; old ones are pruned when the new one is safe."""
        began = time.perf_counter()
        weights = dict(tree_flatten(self._base.model.trainable_parameters()))
        state = TrainState(progress, weights, stepper.optimizer_state())
        path, size = state.save(self.directory)
        prune(self.directory, self._run.save.keep, progress.best.update)
        self.checkpointed = progress.update
        self._when = time.perf_counter()
        cost = self._when - began
        wished = max(SECONDS, min(size / BYTES_A_SECOND, LONGEST))
        self.rest = max(wished, TIMES_ITS_COST * cost)
        return Saved(progress.update, str(path), "checkpoint", cost, self.rest)

    def adapter(self, progress: Progress, why: str) -> Saved:
        """Save the present weights as the run's adapter, over the one that is there."""
        return self._save(self.directory / ADAPTER, progress, why)

    def present(self, progress: Progress, reason: str) -> Saved:
        """Save the present weights: as the adapter if none was better, else beside it."""
        place = self.directory / ADAPTER
        if progress.best.update:
            place = self.directory / f"{LAST}{progress.update:08d}"
        why = "interrupted" if reason == "interrupted" else "last"
        saved = self._save(place, progress, why)
        for path in self.directory.glob(f"{LAST}*"):
            if path != place:  # of an earlier interruption
                remove_directory(path)
        return saved

    def finish(self) -> None:
        """Remove what earlier interruptions left beside the adapter."""
        for path in self.directory.glob(f"{LAST}*"):
            remove_directory(path)

    def _save(self, path: Path, progress: Progress, why: str) -> Saved:
        began = time.perf_counter()
        provenance = self._provenance(progress)
        collect(self._base.model, self._run.lora, provenance).save(path, replace=True)
        self.last = Saved(progress.update, str(path), why, time.perf_counter() - began)
        return self.last

    def _provenance(self, progress: Progress) -> dict[str, Any]:
        """Where the adapter comes from: no path of this machine, since adapters travel."""
        best, run = progress.best, self._run.to_dict()
        del run["out"]
        run["model"] = self._base.identity.public_name
        run["data"]["path"] = Path(run["data"]["path"]).name
        files = describe(self._splits)
        for told in files.values():
            told["path"] = Path(told["path"]).name
        return {
            "base": {**self._base.identity.to_dict(), "name": run["model"]},
            "data": {"format": self._splits.kind, "files": files},
            "run": run,
            "metrics": {
                "update": progress.update,
                "updates": progress.updates,
                "train_loss": _finite(progress.train_loss),
                "valid_loss": _finite(best.loss) if best.update == progress.update else None,
                "valid_loss_before": _finite(progress.before),
                "learning_rate": self._rate,
                "rows_cut": progress.tally.truncated,
            },
            "curve": [
                [point.update, _finite(point.train_loss), _finite(point.valid_loss)]
                for point in progress.curve
            ],
            "versions": versions(),
        }


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None
