"""What touched layers are given while base + adapter compute on rows: seen in passing.

The model runs block by block from the disk (streamed.py), and a visitor gets every layer with its
inputs while its block computes; nothing is kept for it. Layers that no row came by (a tower that
text does not use, heads of latent attention, embeddings, whose inputs are tokens) are handed over
afterwards, without inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxlora.base import open_frozen
from mlxlora.export.merged import Layer, Merged
from mlxlora.export.rounding import Inputs
from mlxlora.export.streamed import Own, logits_at
from mlxlora.export.trial import Trial
from mlxlora.lora.attach import attach
from mlxlora.lora.layers import EXPERTS, LINEAR, LowRank
from mlxlora.quantized import QUANTIZED, unpacked

OWN_EXPERTS = 1 << 36  # experts x width^3: up to here each has moments of its own
SHARED_ROWS = 64  # of all experts' inputs that count beside an expert's own


@dataclass
class Call:
    """What a layer, or several of one input, were given: (n, in) float32, or None if nothing.

    owners: for each row, the expert that got it; None if there are no experts.
    """

    rows: np.ndarray | None = None
    owners: np.ndarray | None = None
    _known: dict[tuple[int, int], Inputs] = field(default_factory=dict)

    def inputs(self, matrix: int, matrices: int, columns: slice) -> Inputs:
        """Of these columns, as one of so many matrices is given them."""
        width = columns.stop - columns.start
        apart = self.owners is not None and matrices * width**3 <= OWN_EXPERTS
        place = matrix if apart else 0, columns.start
        if place not in self._known:
            self._known[place] = (
                Inputs.unknown(width)
                if self.rows is None
                else Inputs.of(self._moments(self.rows[:, columns], matrix if apart else None))
            )
        return self._known[place]

    def _moments(self, rows: np.ndarray, matrix: int | None) -> np.ndarray:
        shared = (rows.T @ rows) / np.float32(len(rows))
        if matrix is None:
            return shared
        own = rows[self.owners == matrix]
        return (own.T @ own + SHARED_ROWS * shared) / np.float32(len(own) + SHARED_ROWS)


@dataclass
class Given:
    """A touched quantized layer, its weight with what was trained, and its inputs.

    target is (matrices, out, in) float32, one matrix unless the layer has experts or heads.
    """

    path: str
    module: nn.Module  # the base's own
    target: mx.array
    call: Call


def visit_layers(
    merged: Merged, rows: Trial, visit: Callable[[Given], None], trust_remote_code: bool = False
) -> None:
    """Call visit once for every touched layer that is quantized. merged is used up."""
    seen: set[str] = set()
    last: tuple[Any, Call] = (None, Call())
    adapter = merged.adapter
    assert adapter is not None
    real = _real_places(rows)

    def see(path: str, layer: LowRank, own: Own, x: mx.array, *rest: Any, **options: Any) -> Any:
        nonlocal last
        if path not in seen:
            seen.add(path)
            if last[0] is not x:  # queries, keys and values have one input
                last = x, Call(*_rows(layer.base, x, rest, real))
            target = layer.merged(unpacked(layer.base), adapter.tensors(path), adapter.scale)
            visit(_given(path, layer.base, target, last[1]))
        return own(x, *rest, **options)

    def opened() -> nn.Module:
        model = open_frozen(merged.source, trust_remote_code)[0]
        attach(model, adapter)
        return model

    watched = [
        path
        for path in adapter.modules
        if isinstance(merged.modules[path], QUANTIZED)
        and isinstance(merged.modules[path], (*LINEAR, *EXPERTS))
    ]
    if watched:
        around = {path: partial(see, path) for path in watched}
        logits_at(opened, rows.inputs, mx.array(rows.batch.positions[:1]), around)
    for piece in merged.walk():
        if not isinstance(piece, Layer) or piece.path in seen:
            continue
        if piece.touched and isinstance(piece.module, QUANTIZED):
            target = unpacked(piece.module) + (piece.weight - piece.before)
            visit(_given(piece.path, piece.module, target, Call()))


def _given(path: str, module: nn.Module, target: mx.array, call: Call) -> Given:
    return Given(path, module, target.reshape(-1, *target.shape[-2:]), call)


def _rows(
    base: nn.Module, x: mx.array, rest: tuple[Any, ...], real: tuple[tuple[int, ...], np.ndarray]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(inputs (n, in), owners (n,) or None) of one call."""
    shape, places = real
    if isinstance(base, EXPERTS):
        indices = np.array(rest[0])
        given = mx.broadcast_to(x[..., 0, :], (*indices.shape, x.shape[-1]))
        return _numpy(given), indices.reshape(-1)
    found = _numpy(x)
    if x.shape[:-1] == shape:  # padding is no input
        found = found[places]
    return (found, None) if len(found) else (None, None)


def _real_places(rows: Trial) -> tuple[tuple[int, ...], np.ndarray]:
    """(B, T), and the places of its B * T up to each row's last supervised token."""
    count, length = rows.batch.inputs.shape
    last = np.full(count, -1)
    np.maximum.at(last, rows.batch.positions // length, rows.batch.positions % length)
    return (count, length), np.flatnonzero(np.arange(length) <= last[:, None])


def _numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
