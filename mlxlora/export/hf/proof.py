"""Whether what is written for transformers is what mlx-lm reads: tried before it is written.

mlx-lm's own sanitize() is run over the names and shapes that would be written. It must give back
exactly the names and shapes that the model has.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxlora.errors import ExportError
from mlxlora.export.hf.names import Family
from mlxlora.lora.layers import weight_shape
from mlxlora.quantized import QUANTIZED

PROVED_SIZE = 1 << 16  # numbers; of larger tensors only name and shape are tried at write time
_EXACT = 2039  # a prime: numbers below, plus or minus 1, are exact in every type used here


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The model's parameters, unpacked where they are packed: name -> shape."""
    modules = dict(model.named_modules())
    found = {}
    for name, array in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if not isinstance(module, QUANTIZED):
            found[name] = tuple(array.shape)
        elif leaf in ("weight", "bias"):
            found[name] = weight_shape(module) if leaf == "weight" else tuple(array.shape)
    return found


def round_trip(model: nn.Module, family: Family, inner: str = "") -> None:
    """Raise ExportError unless mlx-lm makes of what family writes what the model has.

    Tried with made-up numbers: the name and shape of every tensor, and the numbers themselves
    of all that are at most PROVED_SIZE large. inner: what all names begin with that family does
    not know. The model is not changed.
    """
    wanted = shapes(model)
    made = (
        (name.removeprefix(inner), _made_up(number, shape))
        for number, (name, shape) in enumerate(wanted.items())
    )
    try:
        twin = type(model)(model.args)  # sanitize() may do to it what it likes
        back = _sanitized(twin, {inner + name: array for name, array in family.there(made)})
        fault = _fault(wanted, back, set(shapes(twin)))
    except Exception as error:  # of whatever kind a sanitize raises
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise ExportError(
            f"mlx-lm's {family.architecture} is not what was expected, so it cannot be written "
            f"for transformers: {str(fault)[:300]}"
        )


def _sanitized(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    own = getattr(model, "sanitize", lambda weights: weights)
    return dict(tree_flatten(own(weights)))


def _fault(
    wanted: Mapping[str, tuple[int, ...]], back: dict[str, mx.array], own: set[str]
) -> str | None:
    """What differs after the way there and back, which is emptied; None if nothing does."""
    for names, what in ((back.keys() - wanted.keys(), "is new"), (own - back.keys(), "is missing")):
        if names:
            return f"{min(names)} {what}"
    for number, (name, shape) in enumerate(wanted.items()):
        array = back.pop(name, None)
        if array is None:
            return f"{name} is lost"
        if array.shape != shape:
            return f"{name} is {array.shape} and was {shape}"
        # Made once more: some sanitize() write into what they are given.
        small = array.size <= PROVED_SIZE
        if small and not mx.array_equal(array, _made_up(number, shape)):
            return f"{name} holds other numbers"
    return None


def _made_up(number: int, shape: tuple[int, ...]) -> mx.array:
    """Numbers that differ along every axis and from tensor to tensor; not computed yet."""
    total: Any = mx.array(number * 97 + 1)
    for axis, (size, factor) in enumerate(zip(shape, (31, 7, 3, 11), strict=False)):
        along = mx.arange(size).reshape([-1 if other == axis else 1 for other in range(len(shape))])
        total = total + along * factor
    return mx.broadcast_to(total % _EXACT, shape).astype(mx.float16)
