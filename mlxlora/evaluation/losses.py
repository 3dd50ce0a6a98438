"""The loss of every row of a file under a model in its present state."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mlxlora.data.batches import Batch
from mlxlora.train.validate import Validator


@dataclass(frozen=True)
class Losses:
    """Losses by row, in the order of the file; rows without a supervised token are not there."""

    total: float  # of all tokens, summed batch by batch as validation sums it
    rows: np.ndarray  # (n,) int64, 0-based rows in the file
    sums: np.ndarray  # (n,) float64, over the row's supervised tokens
    tokens: np.ndarray  # (n,) int64, supervised

    @property
    def count(self) -> int:
        """Supervised tokens."""
        return int(self.tokens.sum())

    @property
    def mean(self) -> float:
        """Loss per supervised token."""
        return self.total / self.count if self.count else float("nan")

    def find(self, row: int) -> tuple[float, int] | None:
        """(mean loss, supervised tokens) of a row of the file, if it has any."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            return None
        tokens = int(self.tokens[place])
        return float(self.sums[place]) / tokens, tokens


def measure(validator: Validator, batches: Iterable[Batch]) -> Losses:
    total = 0.0
    rows, sums, tokens = [], [], []
    for batch_total, found in validator.by_row(batches):
        total += batch_total
        rows += [one.row for one in found]
        sums += [one.loss for one in found]
        tokens += [one.tokens for one in found]
    order = np.argsort(np.asarray(rows, np.int64))
    return Losses(
        total,
        np.asarray(rows, np.int64)[order],
        np.asarray(sums, np.float64)[order],
        np.asarray(tokens, np.int64)[order],
    )
