"""Modules whose weights are trained, or replaced, whole: for new tokens, heads, norms, or all.

They are float32 while they are trained, and stand in the model under the names of the base's
own, which are put aside. A quantized module has an unquantized one in its place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxlora.errors import AdapterError
from mlxlora.quantized import QUANTIZED, unquantized


@dataclass(frozen=True)
class Part:
    """A part of a model, to be put in the place of what stands there."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)  # by path
    weights: Mapping[str, mx.array] = field(default_factory=dict)  # by name

    def swap_into(self, model: nn.Module) -> "Part":
        """Put it in; returns the part of the model that stood in its place.

        By assignment: nothing of the rest of the model is looked at.
        """
        return Part(
            {path: _assigned(model, path, module) for path, module in self.modules.items()},
            {name: _assigned(model, name, array) for name, array in self.weights.items()},
        )


def _assigned(model: nn.Module, path: str, value: Any) -> Any:
    """Let value stand at this path; returns what stood there."""
    holder: Any = model
    *outer, last = path.split(".")
    for name in outer:
        holder = holder[int(name)] if isinstance(holder, list) else holder[name]
    place: Any = int(last) if isinstance(holder, list) else last
    stood, holder[place] = holder[place], value
    return stood


def trained(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """A float32 copy of a module to be trained, which answers in this type."""
    copy = unquantized(module)
    for name, value in copy.items():
        if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
            copy[name] = value.astype(mx.float32)
    copy.__class__ = _answering(type(copy), dtype)
    copy.unfreeze()
    return copy


def fitted(model: nn.Module, weights: Mapping[str, mx.array]) -> Part:
    """Whole weights, by the base's names, ready to stand in this bare model.

    In the types of the model's own. Raises AdapterError naming every one that does not fit.
    """
    modules = dict(model.named_modules())
    own = dict(tree_flatten(model.parameters()))
    quantized = [n.rpartition(".")[0] for n in weights if n.endswith(".weight")]
    replaced = {
        p: unquantized(modules[p]) for p in quantized if isinstance(modules.get(p), QUANTIZED)
    }
    for path, module in replaced.items():
        own |= {f"{path}.{leaf}": array for leaf, array in module.items()}
    check(own, weights)
    rest = {}
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        array = array.astype(own[name].dtype)
        if path in replaced:
            replaced[path][leaf] = array
        else:
            rest[name] = array
    return Part(replaced, rest)


def check(own: Mapping[str, mx.array], weights: Mapping[str, mx.array]) -> None:
    """Raise AdapterError naming the weights that are not like the base's own."""
    faults = [
        f"{name}: adapter {tuple(array.shape)}, base "
        + (str(tuple(own[name].shape)) if name in own else "has no such weight")
        for name, array in weights.items()
        if name not in own or own[name].shape != array.shape
    ]
    faults += [
        f"{name}: the base's holds no real numbers"
        for name in weights
        if name in own and not mx.issubdtype(own[name].dtype, mx.floating)
    ]
    if faults:
        more = [f"and {len(faults) - 12} more"] if len(faults) > 12 else []
        raise AdapterError(
            "adapter does not fit this base:\n  " + "\n  ".join([*faults[:12], *more])
        )


def _answering(kind: type[nn.Module], dtype: mx.Dtype) -> type[nn.Module]:
    """The class, whose answers are of this type however wide its weights are."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        return kind.__call__(self, *args, **options).astype(dtype)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
