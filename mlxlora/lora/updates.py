"""What is added to weights, before an adapter makes one rank and one scale of it.

Adapters of other programs have ranks and scales module by module, and experts one by one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxlora.lora.layers import layer_for, weight_shape
from mlxlora.quantized import widen


@dataclass(frozen=True)
class Update:
    """Added to a weight (..., out, in): scale * left @ right; its magnitude, if it is DoRA."""

    left: mx.array  # (..., out, r)
    right: mx.array  # (..., r, in)
    scale: float
    m: mx.array | None = None  # (..., out)

    @property
    def rank(self) -> int:
        return int(self.left.shape[-1])

    def at(self, rank: int, scale: float) -> "Update":
        """The same of a rank that is no smaller, padded with zeros, and of this scale."""
        left = self.left if self.scale == scale else self.left * (self.scale / scale)
        more = rank - self.rank
        if more:
            left = mx.pad(left, [*[(0, 0)] * (left.ndim - 1), (0, more)])
        right = mx.pad(self.right, [*[(0, 0)] * (left.ndim - 2), (0, more), (0, 0)])
        return Update(left, right, scale, self.m)

    def equals(self, other: "Update") -> bool:
        pairs = ((self.left, other.left), (self.right, other.right))
        same = all(a.shape == b.shape and bool(mx.array_equal(a, b)) for a, b in pairs)
        return same and self.scale == other.scale


def together(module: nn.Module, updates: Mapping[int, Update]) -> Update:
    """The updates of single experts as one of their stack; the others are not changed."""
    count, out, inside = weight_shape(module)
    rank, scale = common(updates.values())
    nothing = Update(mx.zeros((out, 0)), mx.zeros((0, inside)), scale)
    each = [updates.get(number, nothing).at(rank, scale) for number in range(count)]
    m = None
    if any(update.m is not None for update in updates.values()):
        lengths = mx.linalg.norm(widen(module), axis=-1)
        m = mx.stack([lengths[n] if one.m is None else one.m for n, one in enumerate(each)])
    return Update(mx.stack([u.left for u in each]), mx.stack([u.right for u in each]), scale, m)


def common(updates: Iterable[Update]) -> tuple[int, float]:
    """(the rank that all fit in, the scale that most have and that is not 0)."""
    known = list(updates)
    scales = Counter(update.scale for update in known if update.scale)
    rank = max((update.rank for update in known), default=1)
    return rank, scales.most_common(1)[0][0] if scales else 1.0


def tensors(path: str, module: nn.Module, update: Update) -> dict[str, mx.array]:
    """The adapter's tensors of a module, by their names."""
    kind = layer_for(module)
    assert kind is not None
    a, b = kind.factors(update.left, update.right)
    found = {"lora_a": a, "lora_b": b, **({} if update.m is None else {"m": update.m})}
    return {f"{path}.{leaf}": mx.contiguous(array) for leaf, array in found.items()}
