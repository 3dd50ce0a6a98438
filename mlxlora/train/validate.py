"""The mean loss over a set of rows: every row, cut as in training."""

from collections.abc import Callable, Iterator
from typing import cast

from mlxlora.data.batches import Batch, render_row
from mlxlora.data.records import Rows
from mlxlora.data.render import Example, Renderer
from mlxlora.train.forward import Forward, arrays
from mlxlora.train.objectives import sft

ROWS_AT_ONCE = 256  # sorted together by length


def batches_of(
    rows: Rows, renderer: Renderer, cut: Callable[[list[Example]], list[Batch]], skip_refused: bool
) -> Iterator[Batch]:
    """All rows that have something to predict, cut into micro-batches."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        numbers = range(start, min(len(rows), start + ROWS_AT_ONCE))
        examples = (render_row(rows, n, renderer, skip_refused) for n in numbers)
        yield from cut([e for e in examples if e is not None])


class Validator:
    """Computes mean losses of a model in its present state (attached adapters included).

    Nothing is compiled: a trace a shape would be kept for a few calls.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def __call__(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """(mean loss per supervised token, supervised tokens)."""
        total, tokens = 0.0, 0
        for batch in batches:
            inputs, positions, targets, weights, *segments = arrays(batch)
            logprobs = self._forward(
                inputs, positions, targets, *segments, ends=batch.ends, reach=batch.reach
            )
            total += cast(float, sft(logprobs, weights).item())
            tokens += batch.tokens
        return (total / tokens if tokens else float("nan")), tokens
