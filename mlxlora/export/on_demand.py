"""Layers whose weight is fetched whenever it is asked for, and kept by nobody.

So a model in a format that MLX cannot read lazily is computed with in the memory of one layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora.quantized import QUANTIZED, unquantized

Fetch = Callable[[], mx.array]


def fetching(model: nn.Module, fetches: Mapping[str, Fetch]) -> nn.Module:
    """The model with these weights, by name, in place of its own; matrices on demand.

    Packed layers become plain ones. Raises ValueError for names or shapes that are not its own.
    """
    packed = [(path, m) for path, m in model.named_modules() if isinstance(m, QUANTIZED)]
    model.update_modules(tree_unflatten([(path, unquantized(m)) for path, m in packed]))
    modules = dict(model.named_modules())
    own = dict(tree_flatten(model.parameters()))
    if own.keys() != fetches.keys():
        raise ValueError(f"other weights than the model's: {sorted(own.keys() ^ fetches.keys())}")
    for name, fetch in fetches.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and own[name].ndim > 1:
            _fetch(modules[path], fetch)
        else:
            array = fetch()
            if array.shape != own[name].shape:
                raise ValueError(f"{name} is {array.shape}, the model's is {own[name].shape}")
            model.load_weights([(name, array.astype(own[name].dtype))], strict=False)
    return model


def _fetch(module: nn.Module, fetch: Fetch) -> None:
    """Let the module's weight be what fetch gives, every time."""
    kind, dtype = type(module), module.weight.dtype

    def get(self: nn.Module, name: str, default: Any = None) -> Any:
        return fetch().astype(dtype) if name == "weight" else dict.get(self, name, default)

    def item(self: nn.Module, name: str) -> Any:
        return fetch().astype(dtype) if name == "weight" else dict.__getitem__(self, name)

    module.weight = mx.array(0)
    methods = {"get": get, "__getitem__": item, "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (kind,), methods)
