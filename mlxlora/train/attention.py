"""Causal attention for training: nothing above the diagonal, nothing stored but the output.

softmax(scale Q K' + mask) V is computed by tiles of queries, each against the keys that its
rows may see; the vjp computes the tile's weights again from the row's log-sum-exp (the
recomputation of FlashAttention, Dao et al. 2022, arXiv:2205.14135, in MLX operations). Tiles
are chained, so one is alive at a time. Grouped heads, sliding windows, attention sinks and
rows packed one after another are respected. What is not causal is left to MLX.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import mlx.core as mx

from mlxlora.machine import block_bytes, exp, tile_queries

HIDDEN = -1e30  # added to what a query may not see
# exp(-80) is 1.8e-35: nothing beside a sum of at least 1, yet no denormal; CPUs are slow at those.
FLOOR = -80.0
TILE_STEP = 32  # queries per tile are a multiple of this


@dataclass(frozen=True)
class Spans:
    """What each position sees: itself and its own row's past, at most window positions.

    ends: where the rows packed into the sequence end (one row: the length), if that is known
    when the graph is built. Otherwise ends is the length, segments (B, L) int32 says which row
    each position belongs to, and none is longer than reach.
    """

    ends: tuple[int, ...]
    window: int | None = None
    segments: mx.array | None = None
    reach: int | None = None

    @property
    def back(self) -> int | None:
        """Positions that one query sees at most, itself included; None: its whole row."""
        return min((n for n in (self.window, self.reach) if n is not None), default=None)

    def bias(self, tile: "Tile") -> mx.array:
        """0 where the tile's query (n) sees its key (m), else HIDDEN: (n, m) or (B, 1, 1, n, m)."""
        seen = self._seen(tile.start, tile.stop, tile.first, self.segments)
        seen = seen[:, None, None] if self.segments is not None else seen
        return mx.where(seen, 0.0, HIDDEN)

    def mask(self) -> mx.array:
        """True where a position sees another: (L, L), or (B, 1, L, L) with segments."""
        length, segments = self.ends[-1], self.segments
        if segments is None and len(self.ends) > 1:
            begins = mx.array((0, *self.ends[:-1]))
            segments = (mx.arange(length)[:, None] >= begins).sum(axis=1)[None]
        seen = self._seen(0, length, 0, segments)
        return seen[:, None] if self.segments is not None else seen.reshape(length, length)

    def _seen(self, start: int, stop: int, first: int, segments: mx.array | None) -> mx.array:
        """Queries start..stop against keys first..stop: (n, m), or (B, n, m) with segments."""
        query, key = mx.arange(start, stop)[:, None], mx.arange(first, stop)[None]
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        if segments is not None:
            seen = seen & (segments[:, start:stop, None] == segments[:, None, first:stop])
        return seen


@dataclass(frozen=True)
class Tile:
    """Queries start..stop of the row that begins at row, against keys first..stop."""

    row: int
    first: int
    start: int
    stop: int


def tiles(spans: Spans, step: int) -> list[Tile]:
    """Cut a sequence into tiles of at most step queries, none across two rows."""
    found, row = [], 0
    for end in spans.ends:
        for start in range(row, end, step):
            first = row if spans.back is None else max(row, start - spans.back + 1)
            found.append(Tile(row, first, start, min(end, start + step)))
        row = end
    return found


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    spans: Spans,
    sinks: mx.array | None = None,
) -> mx.array:
    """queries (B, H, L, D), keys (B, K, L, D), values (B, K, L, E) -> (B, H, L, E).

    H is a multiple of K: query head h reads key head h // (H / K). sinks (H,) are logits that
    take weight and give no value.
    """
    heads = queries.shape[0] * queries.shape[1]
    step = block_bytes() // (4 * heads * _longest(spans)) // TILE_STEP * TILE_STEP
    plan = tiles(spans, max(TILE_STEP, min(step, tile_queries())))
    arrays = [queries, keys, values] + ([] if sinks is None else [sinks])
    return _attention(plan, spans, scale)(*arrays)[0]


def _longest(spans: Spans) -> int:
    """Keys that a query sees at most."""
    begins = (0, *spans.ends[:-1])
    longest = max(end - begin for begin, end in zip(begins, spans.ends, strict=True))
    return longest if spans.back is None else min(longest, spans.back)


def _attention(plan: list[Tile], spans: Spans, scale: float) -> Callable[..., Any]:
    """The differentiable function: (queries, keys, values, [sinks]) -> (output, log-sum-exps)."""

    @mx.custom_function
    def forward(*arrays: mx.array) -> tuple[mx.array, ...]:
        queries, keys, values = arrays[:3]
        outputs: list[mx.array] = []
        normals: list[mx.array] = []
        for tile in plan:
            scores = _scores(tile, spans, scale, queries, keys, outputs[-1:])
            top = scores.max(axis=-1, keepdims=True)
            if len(arrays) == 4:
                top = mx.maximum(top, _per_row(arrays[3], scores))
            weights = exp(mx.maximum(scores - top, FLOOR))
            total = weights.sum(axis=-1, keepdims=True)
            if len(arrays) == 4:
                total = total + exp(_per_row(arrays[3], scores) - top)
            seen = values[:, :, tile.first : tile.stop]
            output = (weights.astype(values.dtype) @ seen).astype(mx.float32) / total
            outputs.append(_unfolded(output, queries, tile).astype(values.dtype))
            normals.append(top + mx.log(total))
        return mx.concatenate(outputs, axis=2), *normals

    @forward.vjp
    def backward(
        arrays: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        queries, keys, values = arrays[:3]
        normals = dict(zip(plan, outputs[1:], strict=True))
        parts: tuple[list[mx.array], ...] = ([], [], [])
        sinking = mx.zeros(queries.shape[1])
        for _, row in groupby(plan, key=lambda tile: tile.row):
            of_row = list(row)
            length = of_row[-1].stop - of_row[0].row
            d_keys, d_values = (
                mx.zeros((*a.shape[:2], length, a.shape[3])) for a in (keys, values)
            )
            for tile in of_row:
                done = [d_keys, d_values, *parts[0][-1:]]
                scores = _scores(tile, spans, scale, queries, keys, done)
                weights = exp(mx.maximum(scores - normals[tile], FLOOR))
                given = _folded(cotangents[0], keys, tile)
                output = _folded(outputs[0], keys, tile)
                # What a row's weights give up to each other: sum_j P_j dP_j = dO . O.
                shared = (given.astype(mx.float32) * output).sum(axis=-1, keepdims=True)
                d_query, d_key, d_value = _tile_gradients(
                    tile, scale, (queries, keys, values), weights, given, shared
                )
                parts[0].append(d_query)
                place = slice(tile.first - tile.row, tile.stop - tile.row)
                d_keys[:, :, place] += d_key
                d_values[:, :, place] += d_value
                if len(arrays) == 4:
                    lost = exp(_per_row(arrays[3], scores) - normals[tile]) * shared
                    sinking = sinking - _unfolded(lost, queries, tile).sum(axis=(0, 2, 3))
            parts[1].append(d_keys.astype(keys.dtype))
            parts[2].append(d_values.astype(values.dtype))
        gradients = tuple(mx.concatenate(part, axis=2) for part in parts)
        return gradients if len(arrays) == 3 else (*gradients, sinking.astype(arrays[3].dtype))

    return forward


def _tile_gradients(
    tile: Tile,
    scale: float,
    arrays: tuple[mx.array, mx.array, mx.array],
    weights: mx.array,
    given: mx.array,
    shared: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of the tile's queries (B, H, n, D), and its part in keys' and values' (B, K, m, .).

    dV = P' dO, dS = P * (dO V' - shared), dQ = scale dS K, dK = scale dS' Q.
    """
    queries, keys, values = arrays
    seen = slice(tile.first, tile.stop)
    pull = (given @ values[:, :, seen].swapaxes(-1, -2)).astype(mx.float32)
    d_scores = (weights * (pull - shared)).astype(queries.dtype)
    d_query = (d_scores @ keys[:, :, seen]) * scale
    d_key = (d_scores.swapaxes(-1, -2) @ _folded(queries, keys, tile)) * scale
    d_value = weights.astype(given.dtype).swapaxes(-1, -2) @ given
    return _unfolded(d_query, queries, tile), d_key, d_value


def _scores(
    tile: Tile,
    spans: Spans,
    scale: float,
    queries: mx.array,
    keys: mx.array,
    after: list[mx.array],
) -> mx.array:
    """scale Q K' + bias of a tile, (B, K, G n, m) float32, computed once after is there."""
    folded = _folded(queries, keys, tile) * scale
    if after:
        folded = mx.depends([folded], after)[0]
    scores = folded @ keys[:, :, tile.first : tile.stop].swapaxes(-1, -2)
    n, m = tile.stop - tile.start, tile.stop - tile.first
    apart = scores.astype(mx.float32).reshape(*keys.shape[:2], -1, n, m)
    return (apart + spans.bias(tile)).reshape(scores.shape)


def _folded(array: mx.array, keys: mx.array, tile: Tile) -> mx.array:
    """(B, H, L, D) -> (B, K, G n, D): the tile's rows, the heads of a group under each other."""
    part = array[:, :, tile.start : tile.stop]
    return part.reshape(*keys.shape[:2], -1, array.shape[3])


def _unfolded(array: mx.array, queries: mx.array, tile: Tile) -> mx.array:
    """(B, K, G n, D) -> (B, H, n, D)."""
    return array.reshape(*queries.shape[:2], tile.stop - tile.start, array.shape[3])


def _per_row(sinks: mx.array, scores: mx.array) -> mx.array:
    """sinks (H,) beside scores (B, K, G n, m): (K, G n, 1) float32."""
    heads = scores.shape[1]
    groups = sinks.shape[0] // heads
    rows = mx.repeat(sinks.astype(mx.float32).reshape(heads, groups), scores.shape[2] // groups, 1)
    return rows[..., None]
