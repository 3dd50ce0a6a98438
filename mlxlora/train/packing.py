"""Rows packed one after another, through the mask that mlx-lm's models ask their cache for.

A model that is given a cache object takes its attention mask from the object's make_mask.
RowCache answers with a mask in which a row sees only itself, and remembers which mask it
was; attention then meets the mask again and can work row by row instead of with it. RoPE is
relative, so positions need no reset. Whether a model is packed is found by packing: every block
must come to our attention with our mask (its own would compute all of the mask), rows beside
others must be what they are alone, and must not notice when the others change.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
        self.met = 0  # how often attention was called with one of them

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str:
        """(L, L) or (B, 1, L, L) bool, True where a query sees a key; or "causal"."""
        if not (packed(self.spans) or return_array or (window_size and length > window_size)):
            return "causal"
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
        spans = cache[0].find(mask) if cache else None
        if spans is not None:
            cache[0].met += 1
        elif isinstance(mask, str) and mask == "causal":
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
    first, second = PROBE_ROWS
    ends = (len(first), len(first) + len(second))
    try:
        kinds = make_prompt_cache(model)
        if not all(hasattr(kind, "update_and_fetch") for kind in kinds):
            return False  # a state that runs through the whole sequence
        cache = caches(model, Spans(ends))
        together = outputs(mx.array([[*first, *second]]), cache)
        if cache[0].met < len(model.layers):
            return False
        beside = outputs(mx.array([[*OTHER_ROW, *second]]), caches(model, Spans(ends)))
        alone = [outputs(mx.array([row]), None) for row in PROBE_ROWS]
        apart = mx.concatenate(alone, axis=1)
        # Generous where only rounding speaks: a row that is seen or moved differs far more.
        most = (1e-3, 1e-4) if apart.dtype == mx.float32 else (0.15, 2e-2)
        noticed = difference(beside[:, ends[0] :], together[:, ends[0] :])
        return difference(together, apart) <= most[0] and noticed <= most[1]
    except Exception:  # whatever an architecture raises when given another cache
        return False


def position_limit(model: nn.Module) -> int | None:
    """Positions that the model was made for, as far as its arguments tell.

    Beyond the original number some families scale by absolute position, so rows are not packed
    to more than this.
    """
    return min(_limits(vars(model.args) if hasattr(model, "args") else {}), default=None)


def _limits(arguments: Mapping[str, Any]) -> Iterator[int]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _limits(value)
        elif name.endswith("max_position_embeddings") and isinstance(value, int) and value > 0:
            yield value
