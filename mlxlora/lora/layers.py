"""The low-rank layers: y = base(x) + scale * (x A) B, the base frozen, A and B trained.

LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): scale = alpha / rank, A random, B zero,
so a fresh layer is the base. Parameters are float32; the products run in the activation's
dtype, with no up-cast of the activations. Parameter names and shapes are mlx-lm's, so that
files can be exchanged.

Dropout draws from a key held by the layer, never from global state: whoever trains sets
.dropout_key before each micro-batch, so a recomputed or resumed forward pass draws the same.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)


class LowRank(nn.Module):
    """What the layers share. Subclasses hold the base under the name mlx-lm gives it.

    lora_a and lora_b are made by init(); scale multiplies their product.
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
    def shapes(base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of lora_a and lora_b over this base."""
        raise NotImplementedError

    @staticmethod
    def delta(lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
        """What the layer adds to the base's weight, in the weight's shape, float32."""
        raise NotImplementedError

    @staticmethod
    def fan_in(base: nn.Module) -> int:
        """The dimension that the variance of A is set by."""
        return int(weight_shape(base)[-1])

    def init(self, key: mx.array) -> None:
        """A uniform in +-1/sqrt(fan_in) (as PEFT and mlx-lm do), B zero."""
        bound = 1 / math.sqrt(self.fan_in(self.base))
        shape_a, shape_b = self.shapes(self.base, self.rank)
        self.lora_a = mx.random.uniform(-bound, bound, shape_a, key=key)
        self.lora_b = mx.zeros(shape_b)

    def dropped(self, x: mx.array) -> mx.array:
        if not (self.training and self.dropout > 0):
            return x
        kept = mx.random.bernoulli(1 - self.dropout, x.shape, key=self.dropout_key)
        return x * kept.astype(x.dtype) * (1 / (1 - self.dropout))


class LoRALinear(LowRank):
    """Over Linear and QuantizedLinear: lora_a (in, r), lora_b (r, out)."""

    @staticmethod
    def shapes(base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out, width = weight_shape(base)
        return (width, rank), (rank, out)

    @staticmethod
    def delta(lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
        """(out, in)."""
        return scale * (lora_a.astype(mx.float32) @ lora_b.astype(mx.float32)).T

    def __call__(self, x: mx.array) -> mx.array:
        z = self.dropped(x) @ self.lora_a.astype(x.dtype)
        return mx.addmm(self.base(x), z, self.lora_b.astype(x.dtype), alpha=self.scale)


class LoRAEmbedding(LowRank):
    """Over Embedding and QuantizedEmbedding: lora_a (vocabulary, r), lora_b (r, dims)."""

    base_name = "embedding"

    @staticmethod
    def shapes(base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        count, dims = weight_shape(base)
        return (count, rank), (rank, dims)

    @staticmethod
    def fan_in(base: nn.Module) -> int:
        return int(weight_shape(base)[0])

    @staticmethod
    def delta(lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
        """(vocabulary, dims)."""
        return scale * (lora_a.astype(mx.float32) @ lora_b.astype(mx.float32))

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self.base(tokens)
        z = self.dropped(self.lora_a[tokens].astype(y.dtype) @ self.lora_b.astype(y.dtype))
        return y + self.scale * z

    def as_linear(self, x: mx.array) -> mx.array:
        """x (..., dims) as logits (..., vocabulary): the head of a model with tied weights."""
        z = (self.dropped(x) @ self.lora_b.T.astype(x.dtype)) @ self.lora_a.T.astype(x.dtype)
        return self.base.as_linear(x) + self.scale * z


class LoRASwitchLinear(LowRank):
    """Over the experts of SwitchLinear: lora_a (experts, r, in), lora_b (experts, out, r)."""

    @staticmethod
    def shapes(base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts, out, width = weight_shape(base)
        return (experts, rank, width), (experts, out, rank)

    @staticmethod
    def delta(lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
        """(experts, out, in)."""
        return scale * (lora_b.astype(mx.float32) @ lora_a.astype(mx.float32))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        z = self.dropped(x)
        for factor in (self.lora_a, self.lora_b):
            z = mx.gather_mm(
                z,
                factor.astype(x.dtype).swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        return self.base(x, indices, sorted_indices=sorted_indices) + self.scale * z


# What can be adapted, most specific first: class of the base layer -> its low-rank layer.
LAYERS: tuple[tuple[type, type[LowRank]], ...] = (
    (nn.Linear, LoRALinear),
    (nn.QuantizedLinear, LoRALinear),
    (nn.Embedding, LoRAEmbedding),
    (nn.QuantizedEmbedding, LoRAEmbedding),
    (SwitchLinear, LoRASwitchLinear),
    (QuantizedSwitchLinear, LoRASwitchLinear),
)


def layer_for(module: Any) -> type[LowRank] | None:
    """The low-rank layer that fits over this module, or None."""
    for base, layer in LAYERS:
        if isinstance(module, base):
            return layer
    return None


def merge_delta(weight: mx.array, delta: mx.array) -> mx.array:
    """weight + delta, summed in float32, in weight's dtype."""
    return (weight.astype(mx.float32) + delta).astype(weight.dtype)


def weight_shape(base: nn.Module) -> tuple[int, ...]:
    """The shape of the weight, as if it were not packed."""
    shape = tuple(base.weight.shape)
    if "scales" in base:
        return (*shape[:-1], shape[-1] * 32 // base.bits)
    return shape
