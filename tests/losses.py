"""The loss of an update and its gradients twice: by the model alone, and by our forward pass."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora.data.batches import Batch
from mlxlora.data.render import Example
from mlxlora.train.forward import Forward, arrays
from mlxlora.train.objectives import sft

Found = tuple[float, dict[str, mx.array]]  # loss, and gradients by name


def examples(*lengths: int) -> list[Example]:
    """Rows of these lengths, of random tokens below 200, about 60 % of them trained."""
    random = np.random.default_rng(0)
    return [
        Example(row, random.integers(0, 200, length, np.int32), random.random(length) < 0.6)
        for row, length in enumerate(lengths)
    ]


def of_rows(model: nn.Module, rows: Sequence[Example]) -> Found:
    """By the model's own logits, one row at a time, nothing of ours."""

    def loss(parameters):
        model.update(parameters)
        total = mx.array(0.0)
        for row in rows:
            logits = model(mx.array(row.tokens[None, :-1]))[0].astype(mx.float32)
            targets, mask = mx.array(row.tokens[1:]), mx.array(row.mask[1:])
            total = total + (nn.losses.cross_entropy(logits, targets) * mask).sum()
        return total

    return _computed(model, loss)


def of_batch(model: nn.Module, batch: Batch, forward: Forward | None = None) -> Found:
    forward = forward or Forward(model)
    inputs, positions, targets, weights, *segments = arrays(batch)

    def loss(parameters):
        model.update(parameters)
        plan = {"ends": batch.ends, "reach": batch.reach, "gradient": True}
        return sft(forward(inputs, positions, targets, *segments, **plan), weights)

    return _computed(model, loss)


def _computed(model: nn.Module, loss) -> Found:
    parameters = model.trainable_parameters()
    value, gradients = mx.value_and_grad(loss)(parameters)
    mx.eval(value, gradients)
    model.update(parameters)
    return value.item(), dict(tree_flatten(gradients))


# Of the largest gradient. Rounding alone, which differs from one BLAS kernel to the next, has
# made 1.8e-4 of it; a token masked or counted wrongly makes a hundred times as much.
ROUNDING = 5e-4


def agree(ours: Found, reference: Found) -> None:
    assert ours[0] == pytest.approx(reference[0], rel=2e-5)
    assert ours[1].keys() == reference[1].keys()
    for name, wanted in reference[1].items():
        largest = mx.abs(wanted).max().item()
        np.testing.assert_allclose(
            ours[1][name], wanted, atol=ROUNDING * max(largest, 1e-3), err_msg=name
        )
