"""The adapter of both sides: mlx-lm's layers and ours, over the same modules, same values."""

import re

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlxlora.config import LoraConfig
from mlxlora.lora.fresh import new_layers, random_key
from mlxlora.lora.targets import targets

SCALE = 2.0  # alpha / rank
TRAINED = 0.02  # spread of lora_b in an adapter that stands for a trained one


def attach_ours(model: nn.Module, rank: int, *, trained: bool = False) -> None:
    """Our layers over every linear layer of every block. trained: lora_b is not zero."""
    new_layers(model, LoraConfig(rank=rank, alpha=SCALE * rank), seed=0)
    _same_values(model, trained)


def attach_mlx_lm(model: nn.Module, rank: int, *, trained: bool = False) -> None:
    """mlx-lm's layers over the same modules, with the same values."""
    # mlx-lm names modules as seen from their block, and would take routers of experts too.
    inside = {re.sub(r"^.*?\.\d+\.", "", path) for path in targets(model, LoraConfig())}
    settings = {"rank": rank, "scale": SCALE, "dropout": 0.0, "keys": inside}
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), settings)
    _same_values(model, trained)


def _same_values(model: nn.Module, trained: bool) -> None:
    """Both sides start from the same adapter, so every loss can be compared, not the first only."""
    layers = sorted((path, m) for path, m in model.named_modules() if "lora_a" in m)
    for number, (_, layer) in enumerate(layers):
        shape = layer.lora_a.shape
        bound = max(shape[-2:]) ** -0.5  # the other one is the rank
        layer.lora_a = mx.random.uniform(-bound, bound, shape, key=random_key(0, number))
        if trained:
            drawn = mx.random.normal(layer.lora_b.shape, key=random_key(1, number))
            layer.lora_b = TRAINED * drawn
    mx.eval(model.parameters())
