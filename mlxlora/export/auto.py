"""--bits auto: the touched layers of a quantized base, small and right.

Twice base + adapter run over rows of the adapter's task (calibrate.py). The first time every layer
is tried in several ways on a sample of its outputs, and what they err is measured; bits.py then
finds the best ways under a limit on bytes. The second time every layer is rounded its way, on what
it is given, and handed on. What is kept in between is one number for each layer and way.

A layer's errors count in units of what it answers, sum |(W' - W - D) x|^2 / sum |(W + D) x|^2: an
equal part of the answer lost is taken to do equal harm wherever it is lost.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxlora.export.bits import Option, allotted
from mlxlora.export.calibrate import Given, visit_layers
from mlxlora.export.merged import Merged
from mlxlora.export.rounding import WIDEST, Grid, fitted, fresh, packed, quadratic, rounded
from mlxlora.export.shards import Add
from mlxlora.export.trial import Trial
from mlxlora.lora.layers import weight_shape
from mlxlora.quantized import QUANTIZED

MAX_SIZE = 1.15  # of the fused weights on disk, times the base's
BITS = (4, 5, 6, 8)
OTHER_GROUP = 32  # of an affine layer, where the base's grid is of another kind
SAMPLE_ROWS, SAMPLE_MATRICES = 64, 4  # of a layer, that ways are tried on
ROWS_AT_ONCE = 8192  # rounded together
LEAVES = ("weight", "scales", "biases")

Progress = Callable[[str, int, int], None]  # (what, done, of)


@dataclass(frozen=True)
class Way:
    """How a layer is written: bits (0: not quantized) in groups; from the base's grid or a new one.

    mode: MLX's name for the kind of grid; other than affine ones are rounded as MLX does.
    """

    bits: int
    group_size: int = 0
    own: bool = False
    mode: str = "affine"

    def settings(self) -> dict[str, Any] | bool:
        """For config.json, as mlx-lm reads it."""
        if not self.bits:
            return False
        return _mlx(self)

    def size(self, numbers: int, itemsize: int) -> int:
        """Bytes of so many weights, whose scales and biases take itemsize each."""
        if not self.bits:
            return numbers * itemsize
        beside = 2 * itemsize if self.mode == "affine" else 1
        return numbers * self.bits // 8 + numbers // self.group_size * beside


def ways_of(module: nn.Module) -> list[Way]:
    """What there is to choose from for a quantized layer.

    No smaller groups: they were measured, and take half a bit for a tenth of the error, where a
    bit takes half of it. The base's grid is of use while its steps are not cut often.
    """
    own = Way(module.bits, module.group_size, own=True, mode=module.mode)
    if module.mode != "affine":
        fits = weight_shape(module)[-1] % OTHER_GROUP == 0
        return [own, *(Way(bits, OTHER_GROUP) for bits in BITS if fits), Way(0)]
    bits = (module.bits, *(more for more in BITS if more > module.bits))
    finer = [Way(few, module.group_size, own=True) for few in bits[1:2]]
    return [own, *finer, *(Way(few, module.group_size) for few in bits), Way(0)]


def choose(
    merged: Merged, rows: Trial, max_size: float, progress: Progress, trust_remote_code: bool
) -> dict[str, Way]:
    """For every touched quantized layer the way to write it. merged is used up."""
    options: dict[str, list[Option[Way]]] = {}
    dtypes = scale_types(merged)
    untouched = merged.bytes - sum(
        _size(merged.modules[path], _own(merged.modules[path]), dtype)
        for path, dtype in dtypes.items()
    )
    budget = int(merged.bytes * max_size) - untouched

    def visit(given: Given) -> None:
        dtype = dtypes[given.path]
        options[given.path] = [
            Option(way, _size(given.module, way, dtype), error)
            for way, error in _errors(given, dtype)
        ]
        progress("measuring layers", len(options), len(dtypes))

    visit_layers(merged, rows, visit, trust_remote_code)
    return {path: option.choice for path, option in allotted(options, budget).items()}


def write(
    merged: Merged,
    rows: Trial,
    ways: Mapping[str, Way],
    add: Add,
    progress: Progress,
    trust_remote_code: bool,
) -> None:
    """Hand every touched quantized layer, rounded its way, to add; not its bias. Uses merged up."""
    done = 0
    dtypes = scale_types(merged)

    def visit(given: Given) -> None:
        nonlocal done
        way = ways[given.path]
        shape = tuple(weight_shape(given.module))
        for leaf, array in _rounded(given, way, dtypes[given.path]).items():
            add(f"{given.path}.{leaf}", array.reshape(*shape[:-1], -1))
        done += 1
        progress("rounding layers", done, len(ways))

    visit_layers(merged, rows, visit, trust_remote_code)


def extra_bytes(merged: Merged, ways: Mapping[str, Way]) -> int:
    """How many more than in the base layers take that are written these ways."""
    layers = ((merged.modules[p], ways[p], d) for p, d in scale_types(merged).items() if p in ways)
    return sum(_size(m, way, d) - _size(m, _own(m), d) for m, way, d in layers)


def scale_types(merged: Merged) -> dict[str, mx.Dtype]:
    """Of touched quantized layers, by path: the type on disk of all that is not codes."""
    modules = ((path, merged.modules[path]) for path in merged.touched)
    found = {p: m.scales.dtype for p, m in modules if isinstance(m, QUANTIZED)}
    return {p: d if mx.issubdtype(d, mx.floating) else mx.bfloat16 for p, d in found.items()}


def _errors(given: Given, dtype: mx.Dtype) -> Iterator[tuple[Way, float]]:
    """Every way and what it errs, on a sample of the layer's outputs.

    Before least squares, which take about the same part off every way, and much of the time.
    """
    count, out, width = given.target.shape
    sample = slice(0, out, -(-out // SAMPLE_ROWS))
    ways = ways_of(given.module)
    errors, whole = dict.fromkeys(ways, 0.0), 0.0
    for matrix in range(0, count, -(-count // SAMPLE_MATRICES)):
        for columns in blocks(width, given.module.group_size):
            target = np.array(given.target[matrix, sample, columns])
            inputs = given.call.inputs(matrix, count, columns)
            whole += float(quadratic(target, inputs.moments).sum())
            for way in ways:
                if way.mode != "affine":
                    off = _plainly(target, way, dtype) - target
                    errors[way] += float(quadratic(off, inputs.moments).sum())
                elif way.bits:
                    grid = _grid(given, way, matrix, sample, columns, dtype, target)
                    errors[way] += float(rounded(target, grid, inputs)[1].sum())
    yield from ((way, error / max(whole, 1e-30)) for way, error in errors.items())


def _rounded(given: Given, way: Way, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The tensors to write, (matrices, out, ...)."""
    if not way.bits:
        return {"weight": given.target.astype(dtype)}
    if way.mode != "affine":
        return dict(zip(LEAVES, mx.quantize(given.target.astype(dtype), **_mlx(way)), strict=False))
    count, out, width = given.target.shape
    weight = np.empty((count, out, width * way.bits // 32), np.uint32)
    scales, biases = (np.empty((count, out, width // way.group_size), np.float32) for _ in "sb")
    for matrix in range(count):
        for columns in blocks(width, given.module.group_size):
            words = slice(columns.start * way.bits // 32, columns.stop * way.bits // 32)
            groups = slice(columns.start // way.group_size, columns.stop // way.group_size)
            for start in range(0, out, ROWS_AT_ONCE):
                rows = slice(start, min(start + ROWS_AT_ONCE, out))
                target = np.array(given.target[matrix, rows, columns])
                grid = _grid(given, way, matrix, rows, columns, dtype, target)
                inputs = given.call.inputs(matrix, count, columns)
                codes, grid = fitted(target, grid, inputs, dtype)
                weight[matrix, rows, words] = packed(codes, way.bits)
                scales[matrix, rows, groups] = grid.scales
                biases[matrix, rows, groups] = grid.biases
    arrays = mx.array(weight), mx.array(scales).astype(dtype), mx.array(biases).astype(dtype)
    return dict(zip(LEAVES, arrays, strict=True))


def _plainly(target: np.ndarray, way: Way, dtype: mx.Dtype) -> np.ndarray:
    """What is left of target (rows, columns), rounded as MLX does."""
    parts = mx.quantize(mx.array(target).astype(dtype), **_mlx(way))
    return np.array(mx.dequantize(*parts, **_mlx(way)).astype(mx.float32))


def _grid(
    given: Given,
    way: Way,
    matrix: int,
    rows: slice,
    columns: slice,
    dtype: mx.Dtype,
    target: np.ndarray,
) -> Grid:
    """What target, these rows and columns of one matrix, is rounded on in an affine way."""
    groups = target.shape[-1] // way.group_size
    if way.own:
        return _own_grid(given, matrix, rows, columns).cut(way.bits, groups)
    return fresh(target, way.bits, groups, dtype)


def _own_grid(given: Given, matrix: int, rows: slice, columns: slice) -> Grid:
    """The base's, of some rows and columns of one matrix."""
    size = given.module.group_size
    groups = slice(columns.start // size, columns.stop // size)
    scales, biases = (
        array.reshape(len(given.target), -1, array.shape[-1])[matrix, rows, groups]
        for array in (given.module.scales, given.module.biases)
    )
    return Grid(given.module.bits, *(np.array(a.astype(mx.float32)) for a in (scales, biases)))


def blocks(width: int, group_size: int) -> Iterator[slice]:
    """Columns, in as few equal blocks of whole groups as are no wider than WIDEST."""
    unit = max(group_size, OTHER_GROUP)
    each = -(-width // (-(-width // WIDEST)) // unit) * unit
    for start in range(0, width, each):
        yield slice(start, min(start + each, width))


def _own(module: nn.Module) -> Way:
    return Way(module.bits, module.group_size, own=True, mode=module.mode)


def _size(module: nn.Module, way: Way, dtype: mx.Dtype) -> int:
    return way.size(math.prod(weight_shape(module)), dtype.size)


def _mlx(way: Way) -> dict[str, Any]:
    """For mx.quantize."""
    return {"group_size": way.group_size, "bits": way.bits, "mode": way.mode}
