"""What training begins with and ends with: fresh layers over a base, and the adapter in them.

prepare() puts in what the options choose; collect() reads it back out as an Adapter.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxlora.config import LoraConfig
from mlxlora.errors import ConfigError
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import detach, low_rank_layers, put
from mlxlora.lora.layers import LowRank, layer_for
from mlxlora.lora.methods import METHODS, begin
from mlxlora.lora.targets import by_pattern, check_patterns, targets, trained_whole
from mlxlora.lora.whole import Part, trained
from mlxlora.quantized import QUANTIZED, activation_dtype

FULL = "full"  # lora.method that trains every weight


def prepare(model: nn.Module, config: LoraConfig, seed: int, *, known: bool = True) -> None:
    """Put in what is trained, as config says, and make exactly that trainable.

    known: False for a model whose weights must not be read; where a method starts from them,
    other numbers stand. Raises ConfigError for options that this model cannot honour.
    """
    if config.method != FULL:
        new_layers(model, config, seed, known=known)
    elif any(isinstance(module, QUANTIZED) for module in model.modules()):
        raise ConfigError("lora.method = 'full' cannot train quantized weights; use 'lora'")
    else:
        prepare_full(model)


def new_layers(model: nn.Module, config: LoraConfig, seed: int, *, known: bool = True) -> list[str]:
    """Put fresh low-rank layers over the targets, and train only these and config.train_also.

    Returns the targets' paths. Each layer's start depends on the seed, its place and its base
    only. What was attached is taken out.
    """
    detach(model)
    paths = targets(model, config)
    check_patterns(config, paths)
    modules = dict(model.named_modules())
    method = METHODS[config.method]
    fresh: dict[str, nn.Module] = {}
    for number, path in enumerate(paths):
        rank = int(by_pattern(config.rank_pattern, path, config.rank))
        alpha = float(by_pattern(config.alpha_pattern, path, config.alpha))
        kind = layer_for(modules[path])
        assert kind is not None
        layer = kind(modules[path], rank, method.scale(alpha, rank), config.dropout)
        begin(layer, method, path, random_key(seed, number), known)
        fresh[path] = layer
    dtype = activation_dtype(model)
    fresh |= {path: trained(modules[path], dtype) for path in trained_whole(model, config)}
    put(model, Part(fresh))
    return paths


def prepare_full(model: nn.Module) -> None:
    """Make every weight trainable, in float32; the model remembers the base's."""
    detach(model)
    floats = {
        name: array.astype(mx.float32)
        for name, array in tree_flatten(model.parameters())
        if mx.issubdtype(array.dtype, mx.floating)
    }
    put(model, Part(weights=floats))
    model.unfreeze()


def random_key(*numbers: int) -> mx.array:
    """An MLX random key that is a function of these numbers."""
    return mx.array(np.random.SeedSequence(numbers).generate_state(2))


def collect(model: nn.Module, config: LoraConfig, provenance: Mapping[str, Any]) -> Adapter:
    """What was trained in the model, as an Adapter relative to the base.

    One rank and one scale: where layers differ, the smaller ranks are padded with zeros and
    other scales folded into B, which changes no product.
    """
    blocks = len(getattr(model, "layers", ()))
    layers = dict(low_rank_layers(model))
    inside = tuple(f"{path}." for path in layers)
    weights = {
        name: array
        for name, array in tree_flatten(model.trainable_parameters())
        if not name.startswith(inside)
    }
    if config.method == FULL:
        return Adapter(FULL, weights, blocks=blocks, provenance=provenance)
    factors = {path: layer.low_rank() for path, layer in layers.items()}
    rank = max(layer.sides(*factors[path])[0].shape[-1] for path, layer in layers.items())
    method = METHODS[config.method]
    scale = method.scale(config.alpha, config.rank)
    for path, layer in layers.items():
        weights |= {
            f"{path}.{k}": v for k, v in _tensors(layer, factors[path], rank, scale).items()
        }
    kind = "dora" if method.magnitude else "lora"
    return Adapter(kind, weights, rank, scale, config.dropout, blocks, provenance)


def _tensors(
    layer: LowRank, factors: tuple[mx.array, mx.array], rank: int, scale: float
) -> dict[str, mx.array]:
    shapes = layer.shapes(layer.base, rank)
    a, b = factors
    if layer.scale != scale:
        b = b * (layer.scale / scale)
    found = {"lora_a": _padded(a, shapes["lora_a"]), "lora_b": _padded(b, shapes["lora_b"])}
    return {**found, "m": layer.m} if "m" in layer else found


def _padded(array: mx.array, shape: tuple[int, ...]) -> mx.array:
    return mx.pad(array, [(0, want - have) for want, have in zip(shape, array.shape, strict=True)])
