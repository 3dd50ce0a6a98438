"""One optimizer update on the device: gradients of micro-batches, then one application.

Gradients are summed over micro-batches and divided once by the number of supervised tokens;
norm, clipping and the optimizer are one more function, dispatched before anyone waits. An
update whose loss or norm is not finite leaves weights and optimizer as they were. Each micro-batch
shape is compiled once where machine.compiles(); elsewhere the same functions just run.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxlora.data.batches import Batch, Shape
from mlxlora.lora.attach import low_rank_layers
from mlxlora.machine import compiles
from mlxlora.train.forward import Forward, arrays
from mlxlora.train.objectives import sft
from mlxlora.train.optim import global_norm

Gradients = dict[str, Any]


class Stepper:
    """Computes and applies updates of a model's trainable parameters."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: opt.Optimizer,
        clip: float,
        forward: Forward | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.forward = forward or Forward(model)
        self.shapes: set[Shape] = set()  # met so far
        self._model = model
        self._dropping = [layer for _, layer in low_rank_layers(model) if layer.dropout > 0]
        optimizer.init(model.trainable_parameters())  # lazily made state would cost a trace
        self._zeros = tree_map(mx.zeros_like, model.trainable_parameters())
        compiled = mx.compile if compiles() else _plain
        self._accumulate = _accumulation(self.forward, compiled)
        self._apply = _application(optimizer, clip, compiled)

    def step(
        self, batches: tuple[Batch, ...], seed: int, update: int, rate: float
    ) -> tuple[float, float, int]:
        """One update: (mean loss, norm of the mean gradient before clipping, supervised tokens).

        seed and update (1, 2, ...) are what dropout depends on. If loss or norm is not finite,
        weights and optimizer are not changed.
        """
        loss, summed = self.gradients(batches, seed, update)
        tokens = sum(batch.tokens for batch in batches)
        self.optimizer.learning_rate = rate
        old = self._model.trainable_parameters()
        new, norm = self._apply(old, summed, loss, mx.array(float(tokens)))
        self._model.update(new)
        mx.async_eval(new, self.optimizer.state, loss, norm)
        return cast(float, loss.item()) / tokens, cast(float, norm.item()), tokens

    def optimizer_state(self) -> dict[str, mx.array]:
        """The optimizer's arrays by their dotted names."""
        return dict(tree_flatten(self.optimizer.state))

    def restore_optimizer(self, arrays: Mapping[str, mx.array]) -> None:
        """Put back what optimizer_state() gave. Raises KeyError or ValueError for another one."""
        own = self.optimizer_state()
        if own.keys() != arrays.keys():
            raise KeyError(f"optimizer state {sorted(own.keys() ^ arrays.keys())[0]}")
        strange = [k for k in own if own[k].shape != arrays[k].shape]
        if strange:
            raise ValueError(f"optimizer state {strange[0]} has shape {arrays[strange[0]].shape}")
        _replace(self.optimizer.state, lambda name, _: arrays[name])

    def gradients(
        self, batches: tuple[Batch, ...], seed: int, update: int
    ) -> tuple[mx.array, Gradients]:
        """(summed loss, summed gradients) of the micro-batches; on their way, not waited for."""
        summed, loss = self._zeros, mx.array(0.0)
        for number, batch in enumerate(batches):
            self.shapes.add(batch.shape)
            self._set_dropout_keys(seed, update, number)
            loss, summed = self._accumulate(
                loss, summed, *arrays(batch), ends=batch.ends, reach=batch.reach
            )
            mx.async_eval(loss, summed)
        return loss, summed

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
    forward: Forward, compiled: Callable[..., Any]
) -> Callable[..., tuple[mx.array, Gradients]]:
    model = forward.model

    def loss_of(
        parameters: Gradients, weights: mx.array, *batch: mx.array, **plan: Any
    ) -> mx.array:
        model.update(parameters)
        return sft(forward(*batch, **plan, gradient=True), weights)

    value_and_grad = mx.value_and_grad(loss_of)

    @partial(compiled, inputs=[model.state])
    def accumulate(
        loss: mx.array,
        summed: Gradients,
        inputs: mx.array,
        positions: mx.array,
        targets: mx.array,
        weights: mx.array,
        *segments: mx.array,
        **plan: Any,
    ) -> tuple[mx.array, Gradients]:
        parameters = model.trainable_parameters()
        more, gradients = value_and_grad(
            parameters, weights, inputs, positions, targets, *segments, **plan
        )
        model.update(parameters)  # else the model keeps arrays of the differentiation
        return loss + more, tree_map(mx.add, summed, gradients)

    return accumulate


def _application(
    optimizer: opt.Optimizer, clip: float, compiled: Callable[..., Any]
) -> Callable[..., tuple[Gradients, mx.array]]:
    """Only trained arrays go in and out: the base keeps the very arrays it had."""
    state = [optimizer.state]

    @partial(compiled, inputs=state, outputs=state)
    def apply(
        parameters: Gradients, summed: Gradients, loss: mx.array, tokens: mx.array
    ) -> tuple[Gradients, mx.array]:
        before = dict(tree_flatten(optimizer.state))
        norm = global_norm(summed) / tokens
        factor = mx.minimum(1.0, clip / mx.maximum(norm, 1e-30)) if clip else mx.array(1.0)
        scaled = tree_map(lambda g: g * (factor / tokens), summed)
        new = optimizer.apply_gradients(scaled, parameters)
        good = mx.isfinite(norm) & mx.isfinite(loss)
        _replace(optimizer.state, lambda name, now: _either(good, now, before[name]))
        return tree_map(lambda n, o: mx.where(good, n, o), new, parameters), norm

    return apply


def _either(good: mx.array, new: mx.array, old: mx.array) -> mx.array:
    return new if new is old else mx.where(good, new, old)


def _replace(tree: Any, value: Callable[[str, mx.array], mx.array], prefix: str = "") -> None:
    """Replace every array of a tree by value(dotted name, array), in the tree's own dicts.

    In place, because compiled functions know the dicts.
    """
    for key, item in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        name = f"{prefix}{key}"
        if isinstance(item, mx.array):
            tree[key] = value(name, item)
        else:
            _replace(item, value, f"{name}.")
