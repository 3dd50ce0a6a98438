"""Several low-rank adapters over one frozen base, in one batch of rows.

Every row of a batch belongs to a Row, which names the slot of its adapter; slot 0 is the bare
base. A Tag at the end of a prompt cache's list carries the rows, so that mlx-lm's batch
generator moves them as it moves keys and values. Tagged takes it off and lets the layers know.

A layer holds the factors of all slots in two stacks, a (slots + 1, in, r) and b (slots + 1, r,
out), the scale folded into b and smaller ranks padded with zeros: what is added to row i is
x_i a[slot_i] b[slot_i], by two gathered products.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import _BaseCache, make_prompt_cache

from mlxlora.lora.adapter import Adapter
from mlxlora.lora.layers import LoRALinear, layer_for, weight_shape
from mlxlora.serve.orders import Sampling

RANKS = 8  # the room for a rank grows in steps of so many


@dataclass(eq=False)
class Row:
    """One answer in the making."""

    slot: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    drawn: int = 0  # tokens so far


class Rows:
    """Whose rows the forward pass under way computes."""

    def __init__(self) -> None:
        self.now: list[Row] = []
        self.slots: tuple[int, ...] = ()
        self.present: frozenset[int] = frozenset()
        self.index = mx.zeros((0,), mx.uint32)

    def let(self, rows: list[Row]) -> None:
        self.now = rows
        slots = tuple(row.slot for row in rows)
        if slots != self.slots:
            self.slots, self.present = slots, frozenset(slots)
            self.index = mx.array(slots, mx.uint32)


class Tag(_BaseCache):  # type: ignore[misc]
    """The last of a request's caches: holds no keys, but the rows that the others belong to."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def __deepcopy__(self, memo: object) -> "Tag":
        return Tag(self.rows)  # the rows are who they are: copies would be others

    @classmethod
    def merge(cls, tags: Sequence["Tag"]) -> Self:
        return cls([row for tag in tags for row in tag.rows])

    def filter(self, keep: Sequence[int]) -> None:
        self.rows = [self.rows[i] for i in keep]

    def extend(self, other: "Tag") -> None:
        self.rows = self.rows + other.rows

    def extract(self, i: int) -> "Tag":
        return Tag([self.rows[i]])

    def prepare(self, **_: Any) -> None: ...

    def finalize(self) -> None: ...

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        return count

    def empty(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        return 0


class Tagged:
    """The model as the batch generator sees it: it takes the tag off, then runs the base."""

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        self.model = model
        self.rows = rows

    @property
    def layers(self) -> Any:
        return self.model.layers

    def make_cache(self) -> list[Any]:
        return [*make_prompt_cache(self.model), Tag([Row()])]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        *caches, tag = cache
        self.rows.let(tag.rows)
        return self.model(tokens, cache=caches)


class RowsLinear(nn.Module):
    """Over a Linear or QuantizedLinear: each row with the factors of its own slot."""

    def __init__(self, base: nn.Module, rows: Rows, slots: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.base = base
        self._rows, self._dtype = rows, dtype
        self._a, self._b = self._zeros(slots, 0)
        # Of every slot, its part of the stacks (views, not copies); None where it adds nothing.
        self._own: list[tuple[mx.array, mx.array] | None] = [None] * (slots + 1)
        self._used: set[int] = set()

    def put(self, slot: int, lora_a: mx.array, lora_b: mx.array, scale: float) -> None:
        """Give the slot these factors: lora_a (in, r), lora_b (r, out)."""
        rank = lora_a.shape[1]
        self._make_room(rank)
        self._a[slot] = 0
        self._b[slot] = 0
        self._a[slot, :, :rank] = lora_a.astype(self._dtype)
        self._b[slot, :rank] = (scale * lora_b).astype(self._dtype)
        self._used.add(slot)
        self._view()

    def clear(self, slot: int) -> None:
        """Let the slot add nothing.

        Its next adapter may pass this layer by, and then stands in a batch with others that do not.
        """
        if slot in self._used:
            self._used.discard(slot)
            self._own[slot] = None
            self._a[slot] = 0
            self._b[slot] = 0
            self._view()

    @property
    def empty(self) -> bool:
        return not self._used

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base(x)
        rows = self._rows
        if rows.present.isdisjoint(self._used):
            return y
        if len(rows.present) == 1:
            a, b = self._own[rows.slots[0]]  # type: ignore[misc]
            return mx.addmm(y, x @ a, b)
        # A model may have laid the tokens of its rows end to end.
        z = x.reshape(len(rows.slots), -1, x.shape[-1])
        z = mx.gather_mm(z, self._a, rhs_indices=rows.index)
        z = mx.gather_mm(z, self._b, rhs_indices=rows.index)
        return y + z.reshape(y.shape)

    def _zeros(self, slots: int, rank: int) -> tuple[mx.array, mx.array]:
        out, width = weight_shape(self.base)
        a = mx.zeros((slots + 1, width, rank), self._dtype)
        return a, mx.zeros((slots + 1, rank, out), self._dtype)

    def _make_room(self, rank: int) -> None:
        room = self._a.shape[-1]
        if rank > room:
            more = -(-rank // RANKS) * RANKS - room
            self._a = mx.pad(self._a, [(0, 0), (0, 0), (0, more)])
            self._b = mx.pad(self._b, [(0, 0), (0, more), (0, 0)])

    def _view(self) -> None:
        mx.eval(self._a, self._b)
        for slot in self._used:
            self._own[slot] = (self._a[slot], self._b[slot])
        mx.eval([own for own in self._own if own])


def fits_rows(modules: dict[str, nn.Module], adapter: Adapter) -> bool:
    """Whether an adapter has nothing but low-rank factors over plain linear layers."""
    if adapter.method != "lora" or adapter.whole:
        return False
    return all(
        layer_for(modules.get(path)) is LoRALinear
        and isinstance(modules[path], nn.Linear | nn.QuantizedLinear)
        for path in adapter.modules
    )
