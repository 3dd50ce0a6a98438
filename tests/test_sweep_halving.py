"""When variants are compared, and which go on."""

import math

import pytest

from mlxlora.errors import ConfigError
from mlxlora.sweep.halving import kept, rungs, target


def test_rungs_double_until_one_is_left():
    assert rungs(8, 0.5) == (0.125, 0.25, 0.5)
    assert rungs(4, 0.5) == (0.25, 0.5)
    assert rungs(9, 1 / 3) == pytest.approx((1 / 9, 1 / 3))
    assert rungs(1, 0.5) == ()
    assert rungs(1000, 0.5) == (0.125, 0.25, 0.5)  # nobody is dropped before the first validation


def test_rungs_that_are_asked_for_are_had_or_refused():
    assert rungs(6, 0.5, 1) == (0.5,)
    assert rungs(6, 0.5, 0) == ()
    with pytest.raises(ConfigError, match="ask for fewer"):
        rungs(6, 0.5, 8)
    for keep in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="--keep"):
            rungs(6, keep)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 13])
def test_halving_costs_about_half_of_training_all_and_keeps_the_best(count):
    left, spent, before = list(range(count)), 0.0, 0.0
    for share in rungs(count, 0.5):
        spent += len(left) * (share - before)
        left, before = kept({n: float(n) for n in left}, 0.5), share
    spent += len(left) * (1 - before)
    assert left[0] == 0
    assert spent <= count * (0.85 if count < 8 else 0.55)


def test_a_rung_is_at_a_validation():
    assert target(0.25, 100, 10) == 30
    assert target(0.5, 100, 10) == 50
    assert target(0.5, 7, 10) == 7
    assert target(1.0, 7, 2) == 7


def test_the_better_half_goes_on_ties_by_place_and_no_number_last():
    losses = {"a": 2.0, "b": 1.0, "c": 1.0, "d": math.nan, "e": None}
    assert kept(losses, 0.5) == ["b", "c", "a"]
    assert kept(losses, 0.2) == ["b"]
    assert kept({"d": math.nan, "e": None}, 0.5) == ["d"]
