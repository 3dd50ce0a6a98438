"""Rows packed one after another, through the mask that mlx-lm's models ask their cache for.

A model that is given a cache object takes its attention mask from the object's make_mask.
RowCache answers with a mask in which a row sees only itself, and remembers which mask it
was; attention then meets the mask again and can work row by row instead of with it. RoPE is
relative, so positions need no reset. Whether a model can be packed is found by packing: rows
beside others must be what they are alone, and must not notice when the others change.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxlora.machine import lean_attention_pays
from mlxlora.train.attention import Spans, attention
from mlxlora.train.head import difference

PROBE_ROWS = ((1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11, 12))
OTHER_ROW = (21, 22, 23, 24, 25)


class RowCache:
    """In a KV cache's place: keys and values as they are, masks that keep packed rows apart."""

    offset = 0

    def __init__(self, spans: Spans) -> None:
        self.spans = spans
        self.masks: list[tuple[mx.array, Spans]] = []  # handed out; computed only if used

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """(L, L) or (B, 1, L, L) bool, True where a query sees a key."""
        spans = replace(self.spans, window=window_size)
        for mask, known in self.masks:
            if known.window == window_size:
                return mask
        mask = spans.mask()
        self.masks.append((mask, spans))
        return mask

    def find(self, mask: Any) -> Spans | None:
        """The spans of a mask handed out here, None for any other."""
        return next((spans for own, spans in self.masks if own is mask), None)


def caches(model: nn.Module, spans: Spans) -> list[RowCache]:
    """One RowCache for every cache that the model expects."""
    one = RowCache(spans)
    return [one] * len(make_prompt_cache(model))


@contextmanager
def lean_attention(cache: Sequence[RowCache]) -> Iterator[None]:
    """Inside, mx.fast's attention is ours where that pays; the only patch, undone at the end.

    mlx-lm's models all call it by this name, and none takes another from its caller.
    """
    plain = mx.fast.scaled_dot_product_attention

    def chosen(
        queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **options: Any
    ) -> mx.array:
        mask, sinks = options.get("mask"), options.get("sinks")
        length = queries.shape[2]
        spans = next((s for c in cache[:1] if (s := c.find(mask)) is not None), None)
        if isinstance(mask, str) and mask == "causal":
            spans = Spans((length,))
        square = keys.shape[2] == length and queries.shape[1] % keys.shape[1] == 0
        if spans is None or not square or not lean_attention_pays(length, packed(spans)):
            return plain(queries, keys, values, scale=scale, **options)
        return attention(queries, keys, values, scale, spans, sinks)

    with attention_by(chosen):
        yield


@contextmanager
def attention_by(function: Callable[..., mx.array]) -> Iterator[None]:
    """Inside, mx.fast.scaled_dot_product_attention is this function."""
    before = mx.fast.scaled_dot_product_attention
    mx.fast.scaled_dot_product_attention = function
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = before


def packed(spans: Spans) -> bool:
    return len(spans.ends) > 1 or spans.segments is not None


def can_pack(model: nn.Module, outputs: Callable[[mx.array, Any], mx.array]) -> bool:
    """Whether rows packed together are what they are alone.

    outputs(tokens (B, T), cache) gives (B, T, anything). Recurrent blocks and absolute
    positions fail this, and so does whatever cannot be run with our cache.
    """
    ends = (len(PROBE_ROWS[0]), len(PROBE_ROWS[0]) + len(PROBE_ROWS[1]))
    try:
        kinds = make_prompt_cache(model)
        if not all(hasattr(kind, "update_and_fetch") for kind in kinds):
            return False  # a state that runs through the whole sequence
        together, beside = (
            outputs(mx.array([[*first, *PROBE_ROWS[1]]]), caches(model, Spans(ends)))
            for first in (PROBE_ROWS[0], OTHER_ROW)
        )
        alone = [outputs(mx.array([row]), None) for row in PROBE_ROWS]
        unmoved = mx.array_equal(together[:, ends[0] :], beside[:, ends[0] :])
        apart = mx.concatenate(alone, axis=1)
        coarse = apart.dtype != mx.float32
        return bool(unmoved.item()) and difference(together, apart) <= (3e-2 if coarse else 1e-4)
    except Exception:  # whatever an architecture raises when given another cache
        return False
