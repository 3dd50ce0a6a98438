"""The loss over a set of rows, as their mean or row by row: every row, cut as in training."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np

from mlxlora.data.batches import Batch, render_row
from mlxlora.data.records import Rows
from mlxlora.data.render import Example, Renderer
from mlxlora.train.forward import Forward, arrays
from mlxlora.train.objectives import sft

ROWS_AT_ONCE = 256  # sorted together by length


@dataclass(frozen=True)
class RowLoss:
    """A row's losses, summed over its supervised tokens."""

    row: int  # 0-based row in its file
    loss: float
    tokens: int


def batches_of(
    rows: Rows, renderer: Renderer, cut: Callable[[list[Example]], list[Batch]], skip_refused: bool
) -> Iterator[Batch]:
    """All rows that have something to predict, cut into micro-batches."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        numbers = range(start, min(len(rows), start + ROWS_AT_ONCE))
        examples = (render_row(rows, n, renderer, skip_refused) for n in numbers)
        yield from cut([e for e in examples if e is not None])


class Validator:
    """Computes losses of a model in its present state (attached adapters included).

    Nothing is compiled: a trace a shape would be kept for a few calls.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def __call__(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """(mean loss per supervised token, supervised tokens)."""
        total, tokens = 0.0, 0
        for batch in batches:
            logprobs, weights = self._logprobs(batch)
            total += cast(float, sft(logprobs, weights).item())
            tokens += batch.tokens
        return (total / tokens if tokens else float("nan")), tokens

    def by_row(self, batches: Iterable[Batch]) -> Iterator[tuple[float, list[RowLoss]]]:
        """Of each batch: its loss summed, as __call__ sums it, and the losses of its rows."""
        for batch in batches:
            logprobs, weights = self._logprobs(batch)
            total = cast(float, sft(logprobs, weights).item())
            losses = -np.asarray(logprobs.astype(mx.float32), np.float64)
            ends = np.cumsum([count for _, count in batch.parts])
            yield (
                total,
                [
                    RowLoss(row, float(losses[end - count : end].sum()), count)
                    for end, (row, count) in zip(ends, batch.parts, strict=True)
                ],
            )

    def _logprobs(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """(log p of the targets, their weights), both (S,)."""
        inputs, positions, targets, weights, *segments = arrays(batch)
        logprobs = self._forward(
            inputs, positions, targets, *segments, ends=batch.ends, reach=batch.reach
        )
        return logprobs, weights
