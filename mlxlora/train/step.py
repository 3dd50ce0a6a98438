"""One optimizer update on the device: gradients of micro-batches, then one application.

Gradients are summed over micro-batches and divided once by the number of supervised tokens.
Whether they are finite is known before they are applied, so a bad update never touches the
weights or the optimizer. Each micro-batch shape is compiled once, the application once
(from the update that machine.compile_from() names; before it the same functions just run).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
import numpy as np
from mlx.utils import tree_map

from mlxlora.data.batches import Batch, Shape
from mlxlora.lora.attach import low_rank_layers
from mlxlora.machine import compile_from
from mlxlora.train.objectives import sft
from mlxlora.train.optim import global_norm

Gradients = dict[str, Any]


class Stepper:
    """Computes and applies updates of a model's trainable parameters."""

    def __init__(self, model: nn.Module, optimizer: opt.Optimizer, clip: float) -> None:
        self.optimizer = optimizer
        self.clip = clip
        self.shapes: set[Shape] = set()  # met so far
        self._model = model
        self._dropping = [layer for _, layer in low_rank_layers(model) if layer.dropout > 0]
        optimizer.init(model.trainable_parameters())  # lazily made state would cost a trace
        self._zeros = tree_map(mx.zeros_like, model.trainable_parameters())
        self._compile_from = compile_from()
        self._use(_plain)

    def _use(self, compiled: Callable[..., Any]) -> None:
        self._accumulate = _accumulation(self._model, compiled)
        self._apply = _application(self._model, self.optimizer, compiled)
        self._norm = compiled(global_norm)

    def gradients(
        self, batches: tuple[Batch, ...], seed: int, update: int
    ) -> tuple[float, float, int, Gradients]:
        """(mean loss, norm of the mean gradient, supervised tokens, summed gradients).

        seed and update (1, 2, ...) are what dropout depends on.
        """
        if self._compile_from and update >= self._compile_from:
            self._use(mx.compile)
            self._compile_from = 0
        summed, loss = self._zeros, mx.array(0.0)
        for number, batch in enumerate(batches):
            self.shapes.add(batch.shape)
            self._set_dropout_keys(seed, update, number)
            loss, summed = self._accumulate(
                mx.array(batch.inputs), mx.array(batch.targets), mx.array(batch.mask), loss, summed
            )
            mx.async_eval(loss, summed)
        tokens = sum(batch.tokens for batch in batches)
        norm = self._norm(summed)
        mx.eval(norm, loss)
        mean_loss, mean_norm = (cast(float, x.item()) / tokens for x in (loss, norm))
        return mean_loss, mean_norm, tokens, summed

    def apply(self, gradients: Gradients, norm: float, tokens: int, rate: float) -> None:
        """Clip by the global norm and update the parameters. Not waited for."""
        factor = min(1.0, self.clip / norm) if self.clip and norm > 0 else 1.0
        self.optimizer.learning_rate = rate
        self._apply(gradients, mx.array(factor / tokens))
        mx.async_eval(self._model.trainable_parameters(), self.optimizer.state)

    def _set_dropout_keys(self, *numbers: int) -> None:
        if not self._dropping:
            return
        words = np.random.SeedSequence(numbers).generate_state(2 * len(self._dropping))
        for layer, key in zip(self._dropping, words.reshape(-1, 2), strict=True):
            layer.dropout_key = mx.array(key)


def _plain(function: Callable[..., Any], **state: Any) -> Callable[..., Any]:
    """mx.compile that compiles nothing."""
    return function


def _accumulation(
    model: nn.Module, compiled: Callable[..., Any]
) -> Callable[..., tuple[mx.array, Gradients]]:
    def loss_of(parameters: Gradients, *batch: mx.array) -> tuple[mx.array, mx.array]:
        model.update(parameters)
        return sft(model, *batch)

    value_and_grad = mx.value_and_grad(loss_of)

    @partial(compiled, inputs=[model.state])
    def accumulate(
        inputs: mx.array, targets: mx.array, mask: mx.array, loss: mx.array, summed: Gradients
    ) -> tuple[mx.array, Gradients]:
        parameters = model.trainable_parameters()
        (more, _), gradients = value_and_grad(parameters, inputs, targets, mask)
        model.update(parameters)  # else the model keeps arrays of the differentiation
        return loss + more, tree_map(mx.add, summed, gradients)

    return accumulate


def _application(
    model: nn.Module, optimizer: opt.Optimizer, compiled: Callable[..., Any]
) -> Callable[[Gradients, mx.array], None]:
    """Only the trained arrays are replaced: the base keeps the very arrays it had."""
    state = [optimizer.state]

    @partial(compiled, inputs=state, outputs=state)
    def updated(parameters: Gradients, gradients: Gradients, factor: mx.array) -> Gradients:
        scaled = tree_map(lambda g: g * factor, gradients)
        return cast(Gradients, optimizer.apply_gradients(scaled, parameters))

    def apply(gradients: Gradients, factor: mx.array) -> None:
        model.update(updated(model.trainable_parameters(), gradients, factor))

    return apply
