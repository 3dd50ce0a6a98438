"""The choice under a budget against every possible one."""

import itertools

import numpy as np
import pytest

from mlxlora.export.bits import Option, allotted

SIZES = {4: 100, 5: 125, 6: 150, 8: 200, 16: 400}


def layers(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        str(n): [
            Option(bits, int(size * width), float(harm * 4.0**-bits * rng.uniform(0.5, 2)))
            for bits, size in SIZES.items()
        ]
        for n, (width, harm) in enumerate(
            zip(rng.uniform(0.2, 5, count), rng.uniform(0.01, 9, count), strict=True)
        )
    }


def totals(options):
    return sum(o.bytes for o in options), sum(o.error for o in options)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_within_its_budget_and_near_the_best_that_there_is(seed):
    options = layers(5, seed)
    least = sum(min(o.bytes for o in those) for those in options.values())
    for times in (1.0, 1.1, 1.3, 1.7, 5.0):
        found = totals(allotted(options, int(least * times)).values())
        every = (totals(one) for one in itertools.product(*options.values()))
        best = min(error for size, error in every if size <= least * times)
        assert found[0] <= least * times
        # Marginal analysis leaves at most one step of one layer on the table.
        assert found[1] <= best + max(o.error for those in options.values() for o in those)
        if times in (1.0, 5.0):
            assert found[1] == pytest.approx(best)


def test_more_bytes_never_err_more():
    options = layers(20)
    least = sum(min(o.bytes for o in those) for those in options.values())
    errors = [totals(allotted(options, int(least * t)).values())[1] for t in np.linspace(1, 4, 40)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))


def test_what_costs_more_and_errs_more_is_never_taken():
    options = {"a": [Option("plain", 10, 1.0), Option("worse", 20, 2.0), Option("best", 30, 0.1)]}
    assert allotted(options, 29)["a"].choice == "plain"
    assert allotted(options, 30)["a"].choice == "best"


def test_the_smallest_are_taken_if_even_they_are_too_many():
    assert allotted({"a": [Option(4, 10, 1.0), Option(8, 20, 0.0)]}, 3)["a"].choice == 4
    assert allotted({}, 3) == {}
