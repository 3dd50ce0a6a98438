"""The mathematics of rounding against numpy in float64, and the properties it promises."""

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.export.rounding import (
    Grid,
    Inputs,
    compensated,
    fitted,
    fresh,
    nearest,
    packed,
    quadratic,
    refitted,
    rounded,
)

OUT, WIDTH, GROUP = 24, 128, 32


@pytest.fixture
def inputs():
    """(X, its Inputs): few directions and few columns are much stronger than the others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, WIDTH)) * np.arange(1, WIDTH + 1) ** -0.8
    x = x @ np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    x[:, :4] *= 10
    return x, Inputs.of((x.T @ x / len(x)).astype(np.float32))


def weight(seed=1):
    return (0.05 * np.random.default_rng(seed).normal(size=(OUT, WIDTH))).astype(np.float32)


def base(bits=4, dtype=mx.bfloat16):
    """(weight that lies on a grid, grid, codes)."""
    grid = fresh(weight(), bits, WIDTH // GROUP, dtype)
    codes = nearest(weight(), grid)
    return grid.values(codes), grid, codes


def missed(x, values, target):
    return float(np.square(x @ (values - target).T.astype(np.float64)).sum())


def test_u_is_the_factor_of_the_inverse(inputs):
    found = inputs[1]
    ordered = found.moments[np.ix_(found.order, found.order)].astype(np.float64)
    inverse = found.upper.T.astype(np.float64) @ found.upper
    assert np.abs(ordered @ inverse - np.eye(WIDTH)).max() < 1e-3
    assert np.allclose(found.upper, np.triu(found.upper))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_packed_codes_are_what_mlx_unpacks(bits, dtype):
    grid = fresh(weight(), bits, WIDTH // GROUP, dtype)
    codes = nearest(weight(), grid)
    words, scales, biases = (mx.array(a) for a in (packed(codes, bits), grid.scales, grid.biases))
    theirs = mx.dequantize(words, scales, biases, group_size=GROUP, bits=bits)
    assert np.abs(np.array(theirs) - grid.values(codes)).max() < 1e-6
    own, *_ = mx.quantize(mx.array(weight()), group_size=GROUP, bits=bits)
    if dtype == mx.float32:
        assert (np.array(own) == packed(codes, bits)).mean() > 0.99


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("bits, groups", [(4, 4), (5, 4), (6, 4), (8, 4), (5, 8)])
def test_what_was_not_trained_stays_what_it_is_bit_for_bit(inputs, dtype, bits, groups):
    values, grid, _ = base(dtype=dtype)
    finer = grid.cut(bits, groups)
    assert (rounded(values, finer, inputs[1])[1] == 0).all()
    codes, found = fitted(values, finer, inputs[1], dtype)
    assert (found.values(codes) == values).all()
    for array in (found.scales, found.biases):
        assert (np.array(mx.array(array).astype(dtype).astype(mx.float32)) == array).all()


def test_rows_that_were_not_trained_stay_beside_rows_that_were(inputs):
    values, grid, _ = base()
    target = values.copy()
    target[::2] += 0.01 * weight(2)[::2]
    codes, found = fitted(target, grid, inputs[1], mx.bfloat16)
    assert (found.values(codes)[1::2] == values[1::2]).all()
    assert (found.values(codes)[::2] != values[::2]).any()


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_compensated_rounding_errs_less_than_rounding_to_the_nearest(inputs, bits):
    x, known = inputs
    grid = fresh(weight(), bits, WIDTH // GROUP, mx.bfloat16)
    plain = missed(x, grid.values(nearest(weight(), grid)), weight())
    found = missed(x, grid.values(compensated(weight(), grid, known)), weight())
    assert found < 0.5 * plain


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_row_errs_more_than_rounded_to_the_nearest(inputs, bits):
    moments = inputs[1].moments
    for seed in range(5):
        grid = fresh(weight(seed), bits, WIDTH // GROUP, mx.bfloat16)
        plain = quadratic(grid.values(nearest(weight(seed), grid)) - weight(seed), moments)
        codes, errors = rounded(weight(seed), grid, inputs[1])
        assert (errors <= plain).all()
        assert np.allclose(errors, quadratic(grid.values(codes) - weight(seed), moments))


def test_a_change_smaller_than_a_step_is_kept_in_the_answers(inputs):
    """Rounded to the nearest level of the base's grid it would be gone."""
    x, known = inputs
    values, grid, own = base()
    rng = np.random.default_rng(3)
    delta = rng.normal(size=(OUT, 2)) @ rng.normal(size=(2, 600)) @ x
    delta *= 0.4 * np.abs(grid.scales).min() / np.abs(delta).max()
    target = (values + delta).astype(np.float32)
    assert (nearest(target, grid) == own).all()
    codes, found = fitted(target, grid, known, mx.bfloat16)
    learned = missed(x, values, target)
    assert missed(x, found.values(codes), target) < 0.25 * learned


def test_one_group_is_refitted_as_least_squares_would(inputs):
    known = inputs[1]
    columns = slice(0, GROUP)
    grid = fresh(weight()[:, columns], 3, 1, mx.float32)
    codes = nearest(weight()[:, columns], grid)
    moments = known.moments[columns, columns]
    found = refitted(codes, grid, weight()[:, columns], moments, mx.float32)
    root = np.linalg.cholesky(moments.astype(np.float64)).T
    for row in range(OUT):
        sides = np.stack([codes[row].astype(np.float64), np.ones(GROUP)], axis=1)
        best = np.linalg.lstsq(root @ sides, root @ weight()[row, columns], rcond=None)[0]
        assert found.scales[row, 0] == pytest.approx(best[0], rel=1e-3)
        assert found.biases[row, 0] == pytest.approx(best[1], rel=1e-3)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_refitting_never_makes_it_worse(inputs, bits, dtype):
    moments = inputs[1].moments
    for seed in range(5):
        target = weight(seed)
        grid = fresh(target, bits, WIDTH // GROUP, dtype)
        codes = nearest(target, grid)
        after = refitted(codes, grid, target, moments, dtype)
        errors = [quadratic(g.values(codes) - target, moments) for g in (grid, after)]
        assert (errors[1] <= errors[0] * (1 + 1e-4)).all()


def test_groups_without_steps_and_columns_without_inputs():
    target = weight()
    target[:, :GROUP] = 0.25
    target[3] = 0
    moments = np.eye(WIDTH, dtype=np.float32)
    moments[GROUP : 2 * GROUP] = 0
    for square in (moments, 0 * moments):
        known = Inputs.of(square)
        codes, found = fitted(target, fresh(target, 4, 4, mx.float16), known, mx.float16)
        assert np.isfinite(found.values(codes)).all()
        assert np.abs(found.values(codes)[3]).max() < 1e-3
        assert np.abs(found.values(codes)[:, :GROUP] - target[:, :GROUP]).max() < 1e-3


def test_without_inputs_errors_are_those_in_weights():
    known = Inputs.unknown(WIDTH)
    grid = fresh(weight(), 4, 4, mx.float32)
    assert (compensated(weight(), grid, known) == nearest(weight(), grid)).all()
    off = grid.values(nearest(weight(), grid)) - weight()
    assert np.allclose(quadratic(off, known.moments), np.square(off).sum(axis=1))


def test_a_cut_grid_has_every_level_of_its_own():
    grid = Grid(4, np.float32([[0.5, -0.25]]), np.float32([[-1, 2]]))
    finer = grid.cut(6, 4)
    assert (finer.bits, finer.scales.shape) == (6, (1, 4))
    codes = np.arange(16, dtype=np.uint8).reshape(1, 16)
    assert (finer.values(4 * codes) == grid.values(codes)).all()
