"""The mean loss over a set of rows: every row, in the few shapes of training."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxlora.data.batches import Batch, Shape, cut, render_row
from mlxlora.data.records import Rows
from mlxlora.data.render import Renderer
from mlxlora.machine import on_cpu
from mlxlora.train.objectives import sft

ROWS_AT_ONCE = 256  # sorted together by length


def batches_of(
    rows: Rows, renderer: Renderer, shapes: Sequence[Shape], skip_refused: bool
) -> Iterator[Batch]:
    """All rows that have something to predict, cut into these shapes."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        numbers = range(start, min(len(rows), start + ROWS_AT_ONCE))
        examples = (render_row(rows, n, renderer, skip_refused) for n in numbers)
        yield from cut([e for e in examples if e is not None and e.supervised], shapes)


class Validator:
    """Computes mean losses of a model in its present state (attached adapters included)."""

    def __init__(self, model: nn.Module) -> None:
        loss = partial(sft, model)
        # On the CPU, compiling a handful of calls costs more than it saves.
        self._loss = loss if on_cpu() else mx.compile(loss, inputs=[model.state])

    def __call__(self, batches: Iterator[Batch]) -> tuple[float, int]:
        """(mean loss per supervised token, supervised tokens)."""
        total, tokens = 0.0, 0
        for batch in batches:
            loss, count = self._loss(
                mx.array(batch.inputs), mx.array(batch.targets), mx.array(batch.mask)
            )
            total += cast(float, loss.item())
            tokens += cast(int, count.item())
        return (total / tokens if tokens else float("nan")), tokens
