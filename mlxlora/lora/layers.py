"""The low-rank layers: y = base(x) + scale * (x A) B, the base frozen, A and B trained.

LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): A random, B zero, so a fresh layer is the
base. Parameters are float32; the products run in the activation's dtype, with no up-cast of
the activations. Parameter names and shapes are mlx-lm's, so that files can be exchanged.

A layer may start from parts of the base's own weight (start_a, start_b: methods.py), which are
then taken off again, so that what it adds is relative to the base as it is: W + A B - A0 B0.
With a magnitude m it is DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5): every output of
the changed weight is brought to the length m.

Dropout draws from a key held by the layer, never from global state: whoever trains sets
.dropout_key before each micro-batch, so a recomputed or resumed forward pass draws the same.
"""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxlora.quantized import multiply, widen

LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)


class LowRank(nn.Module):
    """What the layers share. Subclasses hold the base under the name mlx-lm gives it.

    Seen from the base's weight (..., out, in), what is added is scale * left @ right, left
    (..., out, r) and right (..., r, in): sides() and factors() turn lora_a and lora_b into
    these and back.
    """

    base_name = "linear"

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self[self.base_name] = base
        self.rank = rank
        self.scale = scale
        self.dropout = dropout
        if dropout > 0:
            self.dropout_key = mx.random.key(0)

    @property
    def base(self) -> nn.Module:
        return self[self.base_name]  # type: ignore[no-any-return]

    @staticmethod
    def sides(lora_a: mx.array, lora_b: mx.array) -> tuple[mx.array, mx.array]:
        """(left, right)."""
        raise NotImplementedError

    @staticmethod
    def factors(left: mx.array, right: mx.array) -> tuple[mx.array, mx.array]:
        """(lora_a, lora_b): the inverse of sides()."""
        raise NotImplementedError

    def through(self, right: mx.array) -> mx.array:
        """The base's weight times right's transpose: (..., r, in) to (..., out, r)."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of lora_a, lora_b and m over this base."""
        *outer, out, width = weight_shape(base)
        left, right = mx.zeros((*outer, out, rank)), mx.zeros((*outer, rank, width))
        a, b = cls.factors(left, right)
        return {"lora_a": tuple(a.shape), "lora_b": tuple(b.shape), "m": (*outer, out)}

    @classmethod
    def merged(cls, weight: mx.array, own: Mapping[str, mx.array], scale: float) -> mx.array:
        """The base's weight, float32, with what the tensors of a layer do to it."""
        left, right = cls.sides(own["lora_a"], own["lora_b"])
        weight = weight + scale * (left.astype(mx.float32) @ right.astype(mx.float32))
        if "m" in own:
            weight = weight * (own["m"] / mx.linalg.norm(weight, axis=-1))[..., None]
        return weight

    @staticmethod
    def fan_in(base: nn.Module) -> int:
        """The dimension that the variance of A is set by."""
        return int(weight_shape(base)[-1])

    def init(self, key: mx.array) -> None:
        """A uniform in +-1/sqrt(fan_in) (as PEFT and mlx-lm do), B zero."""
        bound = 1 / math.sqrt(self.fan_in(self.base))
        shapes = self.shapes(self.base, self.rank)
        self.lora_a = mx.random.uniform(-bound, bound, shapes["lora_a"], key=key)
        self.lora_b = mx.zeros(shapes["lora_b"])

    def start_from(self, left: mx.array, right: mx.array) -> None:
        """Train from these factors of a part of the base's weight, which is taken off again."""
        self.lora_a, self.lora_b = self.factors(left, right)
        self.start_a, self.start_b = self.lora_a, self.lora_b

    def low_rank(self) -> tuple[mx.array, mx.array]:
        """lora_a and lora_b as they act: with those they started from taken off."""
        if "start_a" not in self:
            return self.lora_a, self.lora_b
        left, right = self.sides(self.lora_a, self.lora_b)
        left_0, right_0 = self.sides(self.start_a, self.start_b)
        return self.factors(
            mx.concatenate([left, -left_0], axis=-1), mx.concatenate([right, right_0], axis=-2)
        )

    def add_magnitude(self, known: bool = True) -> None:
        """Make it DoRA: m, trained, starts as the length of each output's weights.

        known: False if the base's weights are not to be read; then m stands for no numbers.
        """
        self.squares = mx.ones(self.shapes(self.base, 1)["m"])
        if known:
            self.squares = widen(self.base).square().sum(-1)
        self.m = mx.sqrt(self.squares)

    def settle(self) -> None:
        """The tensors will not change any more: lengths need not be computed again and again."""
        if "m" in self:
            self.squares = widen(self.base).square().sum(-1)
            self.settled_gain = self.gain()
            del self.squares
            mx.eval(self.settled_gain)  # layer by layer: each widens its weight

    def gain(self) -> mx.array:
        """m / |W + scale * left right|, for each output; the length is constant to the gradient.

        |w + s l R|^2 = |w|^2 + 2 s l (w R')' + s^2 l (R R') l' needs W times r vectors, and
        never the changed weight itself. (Constant: section 4.3 of the paper.)
        """
        if "settled_gain" in self:
            return self.settled_gain
        left, right = map(mx.stop_gradient, self.sides(*self.low_rank()))
        cross = (self.through(right).astype(mx.float32) * left).sum(-1)
        square = ((left @ (right @ right.swapaxes(-1, -2))) * left).sum(-1)
        total = self.squares + 2 * self.scale * cross + self.scale**2 * square
        return self.m / mx.sqrt(mx.maximum(total, 1e-30))

    def dropped(self, x: mx.array) -> mx.array:
        if not (self.training and self.dropout > 0):
            return x
        kept = mx.random.bernoulli(1 - self.dropout, x.shape, key=self.dropout_key)
        return x * kept.astype(x.dtype) * (1 / (1 - self.dropout))


class LoRALinear(LowRank):
    """Over Linear and QuantizedLinear: lora_a (in, r), lora_b (r, out)."""

    @staticmethod
    def sides(lora_a: mx.array, lora_b: mx.array) -> tuple[mx.array, mx.array]:
        return lora_b.T, lora_a.T

    @staticmethod
    def factors(left: mx.array, right: mx.array) -> tuple[mx.array, mx.array]:
        return right.T, left.T

    def through(self, right: mx.array) -> mx.array:
        return multiply(self.base, right.astype(_own_dtype(self.base))).T

    def __call__(self, x: mx.array) -> mx.array | list[mx.array]:
        answer = self.base(x)
        if isinstance(answer, mx.array):
            return self._added(x, answer)
        # Several projections in one layer, which answers with one array for each.
        places = np.cumsum([part.shape[-1] for part in answer])[:-1].tolist()
        return mx.split(self._added(x, mx.concatenate(answer, axis=-1)), places, axis=-1)

    def _added(self, x: mx.array, y: mx.array) -> mx.array:
        """y, the base's answer to x, and what the low-rank factors make of it."""
        a, b = self.low_rank()
        z = self.dropped(x) @ a.astype(x.dtype)
        y = mx.addmm(y, z, b.astype(x.dtype), alpha=self.scale)
        if "m" not in self:
            return y
        gain = self.gain().astype(x.dtype)
        y = gain * y
        return y + (1 - gain) * self.base.bias if "bias" in self.base else y


class LoRAEmbedding(LowRank):
    """Over Embedding and QuantizedEmbedding: lora_a (vocabulary, r), lora_b (r, dims)."""

    base_name = "embedding"

    @staticmethod
    def sides(lora_a: mx.array, lora_b: mx.array) -> tuple[mx.array, mx.array]:
        return lora_a, lora_b

    @staticmethod
    def factors(left: mx.array, right: mx.array) -> tuple[mx.array, mx.array]:
        return left, right

    @staticmethod
    def fan_in(base: nn.Module) -> int:
        return int(weight_shape(base)[0])

    def through(self, right: mx.array) -> mx.array:
        return self.base.as_linear(right.astype(_own_dtype(self.base))).T

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.base(tokens)
        a, b = self.low_rank()
        z = self.scale * (a[tokens].astype(y.dtype) @ b.astype(y.dtype))
        if "m" not in self:
            return y + self.dropped(z)
        if "settled_gain" in self:
            gain = self.settled_gain[tokens]
        else:  # of the tokens at hand only
            length = mx.linalg.norm((y + z).astype(mx.float32), axis=-1)
            gain = self.m[tokens] / mx.stop_gradient(length)
        return gain[..., None].astype(y.dtype) * (y + self.dropped(z))

    def as_linear(self, x: mx.array) -> mx.array:
        """x (..., dims) as logits (..., vocabulary): the head of a model with tied weights."""
        a, b = self.low_rank()
        z = (self.dropped(x) @ b.T.astype(x.dtype)) @ a.T.astype(x.dtype)
        y = self.base.as_linear(x) + self.scale * z
        return y * self.gain().astype(x.dtype) if "m" in self else y


class LoRASwitchLinear(LowRank):
    """Over the experts of SwitchLinear: lora_a (experts, r, in), lora_b (experts, out, r)."""

    @staticmethod
    def sides(lora_a: mx.array, lora_b: mx.array) -> tuple[mx.array, mx.array]:
        return lora_b, lora_a

    @staticmethod
    def factors(left: mx.array, right: mx.array) -> tuple[mx.array, mx.array]:
        return right, left

    def through(self, right: mx.array) -> mx.array:
        y = self.base(right.astype(_own_dtype(self.base)), mx.arange(right.shape[0]))
        if "bias" in self.base:
            y = y - self.base.bias[:, None]
        return y.swapaxes(-1, -2)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        z = self.dropped(x)
        for factor in self.low_rank():
            z = mx.gather_mm(
                z,
                factor.astype(x.dtype).swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        y = self.base(x, indices, sorted_indices=sorted_indices) + self.scale * z
        if "m" not in self:
            return y
        gain = self.gain().astype(x.dtype)[indices][..., None, :]
        y = gain * y
        return y + (1 - gain) * self.base.bias[indices][..., None, :] if "bias" in self.base else y


class LoRAMultiLinear(LowRank):
    """Over MultiLinear, one matrix a head, used both ways in multi-latent attention.

    lora_a (heads, r, in), lora_b (heads, out, r).
    """

    @staticmethod
    def sides(lora_a: mx.array, lora_b: mx.array) -> tuple[mx.array, mx.array]:
        return lora_b, lora_a

    @staticmethod
    def factors(left: mx.array, right: mx.array) -> tuple[mx.array, mx.array]:
        return right, left

    def through(self, right: mx.array) -> mx.array:
        return self.base(right.astype(_own_dtype(self.base))).swapaxes(-1, -2)

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """x (..., heads, n, in) to (..., heads, n, out), or back if not transpose."""
        left, right = (side.astype(x.dtype) for side in self.sides(*self.low_rank()))
        gain = self.gain().astype(x.dtype)[:, None] if "m" in self else 1
        if transpose:
            z = (self.dropped(x) @ right.swapaxes(-1, -2)) @ left.swapaxes(-1, -2)
            return gain * (self.base(x) + self.scale * z)
        x = gain * x
        return self.base(x, transpose=False) + self.scale * ((self.dropped(x) @ left) @ right)


# What can be adapted, most specific first: class of the base layer -> its low-rank layer.
LAYERS: tuple[tuple[type, type[LowRank]], ...] = (
    (nn.Linear, LoRALinear),
    (nn.QuantizedLinear, LoRALinear),
    (nn.Embedding, LoRAEmbedding),
    (nn.QuantizedEmbedding, LoRAEmbedding),
    (SwitchLinear, LoRASwitchLinear),
    (QuantizedSwitchLinear, LoRASwitchLinear),
    (MultiLinear, LoRAMultiLinear),
    (QuantizedMultiLinear, LoRAMultiLinear),
)


def layer_for(module: Any) -> type[LowRank] | None:
    """The low-rank layer that fits over this module, or None."""
    for base, layer in LAYERS:
        if isinstance(module, base):
            return layer
    return None


def weight_shape(base: nn.Module) -> tuple[int, ...]:
    """The shape of the weight, as if it were not packed."""
    shape = tuple(base.weight.shape)
    if "scales" in base:
        return (*shape[:-1], shape[-1] * 32 // base.bits)
    return shape


def _own_dtype(base: nn.Module) -> mx.Dtype:
    """The type that the base multiplies in without widening its weight."""
    dtype = base.get("scales", base.weight).dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16
