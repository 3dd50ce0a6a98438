"""One weight on a grid of few levels, rounded so that the layer's answers stay what they were.

A row of the weight is w, what the layer is given has second moments H = X'X / n, and rounding to
v errs by (v - w) H (v - w)'. Rows are independent of each other. A grid has a scale and a bias for
every group of columns: v = scale * code + bias, code = 0 .. 2^bits - 1, as mx.dequantize has it.

- The base's own grid, each step cut into 2^k, holds every weight of the base exactly (a scale
  divided by 2^k loses nothing in any floating-point type). What was not trained can stay as it is.
- GPTQ (Frantar et al. 2022, arXiv:2210.17323): columns are rounded one after another, those that
  are given most first, and what each errs is made up for by those that are still to come. With
  H^-1 = U'U, U upper triangular, the error e of column k moves column j by -e U_kj / U_kk.
- For given codes the error is quadratic in the scale and bias of a group, whose best values solve
  two equations each (least squares); a group at a time, round after round, never makes it worse.

All arrays are numpy's; nothing here knows of models or files.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

DAMPING = 0.01  # of the mean of H's diagonal, added to it: inputs seen are not all inputs
AT_ONCE = 64  # columns between two updates of all that are still to come
SWEEPS = 1  # of least squares over all groups
LEAST_GAIN = 1e-6  # of a group's own part in the answers: less is noise of float32
WIDEST = 4096  # columns whose errors make up for each other: Cholesky costs their number cubed

Array = np.ndarray


@dataclass(frozen=True)
class Grid:
    """scales and biases (rows, groups), float32, for codes of so many bits."""

    bits: int
    scales: Array
    biases: Array

    def cut(self, bits: int, groups: int) -> "Grid":
        """The same levels and more: steps halved once for each further bit, groups split."""
        times = groups // self.scales.shape[-1]
        scales = np.repeat(self.scales / np.float32(2 ** (bits - self.bits)), times, axis=-1)
        return Grid(bits, scales, np.repeat(self.biases, times, axis=-1))

    def part(self, rows: slice, groups: slice) -> "Grid":
        return Grid(self.bits, self.scales[rows, groups], self.biases[rows, groups])

    def values(self, codes: Array) -> Array:
        """What codes (rows, columns) stand for, float32."""
        shape = (*self.scales.shape, codes.shape[-1] // self.scales.shape[-1])
        grouped = codes.reshape(shape).astype(np.float32)
        return (grouped * self.scales[..., None] + self.biases[..., None]).reshape(codes.shape)


@dataclass(frozen=True)
class Inputs:
    """What some columns of a layer are given: second moments, and what GPTQ makes of them.

    moments (columns, columns) float32, damped; order: columns, those given most first; upper: U
    of the inverse, in that order, float32.
    """

    moments: Array
    order: Array
    upper: Array

    @classmethod
    def of(cls, moments: Array) -> "Inputs":
        """Of second moments (columns, columns), factorised in float64."""
        diagonal = np.diagonal(moments)
        mean = float(diagonal.mean()) or 1.0
        damped = moments.astype(np.float64) + DAMPING * mean * np.eye(len(moments))
        order = np.argsort(-diagonal, kind="stable")
        # H = L L' of the columns in reverse turns into H^-1 = U'U in order, U = L^-1 in reverse.
        backwards = order[::-1]
        with mx.stream(mx.cpu):
            lower = mx.linalg.cholesky(mx.array(damped[np.ix_(backwards, backwards)], mx.float64))
            inverse = np.array(mx.linalg.tri_inv(lower))
        upper = np.ascontiguousarray(inverse[::-1, ::-1], np.float32)
        return cls(damped.astype(np.float32), order, upper)

    @classmethod
    def unknown(cls, width: int) -> "Inputs":
        """Of columns that are given one thing as often as another: errors are those in weights."""
        same = np.eye(width, dtype=np.float32)
        return cls(same, np.arange(width), same)


def fresh(target: Array, bits: int, groups: int, dtype: mx.Dtype) -> Grid:
    """The grid that mx.quantize lays over target (rows, columns), with scales of this type."""
    size = target.shape[-1] // groups
    _, scales, biases = mx.quantize(mx.array(target).astype(dtype), group_size=size, bits=bits)
    return Grid(bits, _numpy(scales), _numpy(biases))


def nearest(target: Array, grid: Grid) -> Array:
    """Codes (rows, columns) of the levels next to target."""
    shape = (*grid.scales.shape, target.shape[-1] // grid.scales.shape[-1])
    steps = (target.reshape(shape) - grid.biases[..., None]) * _inverse(grid.scales)[..., None]
    codes: Array = np.clip(np.rint(steps), 0, 2**grid.bits - 1).astype(np.uint8)
    return codes.reshape(target.shape)


def compensated(target: Array, grid: Grid, inputs: Inputs) -> Array:
    """Codes (rows, columns) by GPTQ."""
    width, top = target.shape[-1], np.float32(2**grid.bits - 1)
    order, upper = inputs.order, inputs.upper
    group = order // (width // grid.scales.shape[-1])
    scales, biases = np.ascontiguousarray(grid.scales.T), np.ascontiguousarray(grid.biases.T)
    steps = _inverse(scales)
    left = np.ascontiguousarray(target.T[order], np.float32)  # (columns, rows): still to round
    codes = np.empty(left.shape, np.uint8)
    for start in range(0, width, AT_ONCE):
        stop = min(start + AT_ONCE, width)
        errors = np.empty((stop - start, left.shape[-1]), np.float32)
        for k in range(start, stop):
            scale, bias = scales[group[k]], biases[group[k]]
            code = np.clip(np.rint((left[k] - bias) * steps[group[k]]), 0, top)
            error = (left[k] - (code * scale + bias)) / upper[k, k]
            left[k + 1 : stop] -= upper[k, k + 1 : stop, None] * error
            codes[order[k]], errors[k - start] = code, error
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T)


def refitted(codes: Array, grid: Grid, target: Array, moments: Array, dtype: mx.Dtype) -> Grid:
    """The grid whose levels, for these codes, give answers nearest to target's.

    Its scales and biases are numbers of this type. A group's change is taken where, so rounded,
    it makes the error smaller.
    """
    size = target.shape[-1] // grid.scales.shape[-1]
    scales, biases = grid.scales.copy(), grid.biases.copy()
    off = grid.values(codes) - target
    for _ in range(SWEEPS):
        for group in range(scales.shape[-1]):
            own = slice(group * size, (group + 1) * size)
            code, square = codes[:, own].astype(np.float32), moments[own, own]
            slope = off @ moments[:, own]
            new = _least_squares(code, square, slope)
            scale = _as(scales[:, group] + new[0], dtype)
            bias = _as(biases[:, group] + new[1], dtype)
            change = (scale - scales[:, group])[:, None] * code
            change += (bias - biases[:, group])[:, None]
            gain = -2 * (slope * change).sum(axis=1) - quadratic(change, square)
            better = gain > LEAST_GAIN * quadratic(target[:, own], square)
            scales[better, group], biases[better, group] = scale[better], bias[better]
            off[:, own] += change * better[:, None]
    return replace(grid, scales=scales, biases=biases)


def rounded(target: Array, grid: Grid, inputs: Inputs) -> tuple[Array, Array]:
    """(codes, error of each row) for target (rows, columns) on this grid.

    By GPTQ, but no row errs more than rounded to the nearest levels.
    """
    codes, plain = compensated(target, grid, inputs), nearest(target, grid)
    error, plain_error = (
        quadratic(grid.values(which) - target, inputs.moments) for which in (codes, plain)
    )
    better = error <= plain_error
    return np.where(better[:, None], codes, plain), np.where(better, error, plain_error)


def fitted(target: Array, grid: Grid, inputs: Inputs, dtype: mx.Dtype) -> tuple[Array, Grid]:
    """(codes, grid) for target (rows, columns): rounded, then this grid refitted to the codes."""
    codes, _ = rounded(target, grid, inputs)
    return codes, refitted(codes, grid, target, inputs.moments, dtype)


def quadratic(rows: Array, square: Array) -> Array:
    """r S r' of every row r."""
    found: Array = ((rows @ square) * rows).sum(axis=1)
    return found


def packed(codes: Array, bits: int) -> Array:
    """Codes (rows, columns) as MLX packs them: (rows, columns * bits / 32) uint32.

    One code's bits after another's, the lowest first, into words, the lowest bits first.
    """
    rows, columns = codes.shape
    each = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    words: Array = np.packbits(each.reshape(rows, columns * bits), axis=-1, bitorder="little")
    return words.view(np.uint32)


def _least_squares(code: Array, square: Array, slope: Array) -> tuple[Array, Array]:
    """The change (rows,) of scale and of bias at which the error has no slope."""
    code, square, slope = (array.astype(np.float64) for array in (code, square, slope))
    moved = code @ square
    a, b, c = (moved * code).sum(axis=1), moved.sum(axis=1), square.sum()
    first, second = (slope * code).sum(axis=1), slope.sum(axis=1)
    determinant = a * c - b * b
    known = determinant > 1e-9 * a * c  # else all codes are one: only their level counts
    safe = np.where(known, determinant, 1.0)
    scale = np.where(known, (b * second - c * first) / safe, 0.0)
    bias = np.where(known, (b * first - a * second) / safe, -second / max(c, 1e-30))
    return scale, bias


def _inverse(scales: Array) -> Array:
    """1 / scales; 0 where there is no step."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def _as(values: Array, dtype: mx.Dtype) -> Array:
    """The nearest numbers of this type, as float32."""
    return _numpy(mx.array(values.astype(np.float32)).astype(dtype))


def _numpy(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32))
