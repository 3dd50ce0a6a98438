"""Bootstrap intervals beside scipy's, and beside what a sum of known numbers must do."""

import tracemalloc

import numpy as np
import pytest

from mlxlora.evaluation import intervals
from mlxlora.evaluation.intervals import RESAMPLES, interval, replicates


def ratio(sums, tokens, axis=-1):
    return sums.sum(axis=axis) / tokens.sum(axis=axis)


def test_the_interval_of_a_loss_is_scipys_percentile_interval():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(5)
    tokens = random.integers(1, 60, 80).astype(float)
    sums = tokens * random.gamma(2.0, 0.7, 80)
    found = interval(replicates(sums[:, None], tokens[:, None])[:, 0])
    scipys = stats.bootstrap(
        (sums, tokens),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found == pytest.approx((scipys.low, scipys.high), rel=1e-9)


def test_differences_are_paired_as_scipys_are():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(6)
    tokens = random.integers(1, 60, 50).astype(float)
    a = tokens * random.gamma(2.0, 0.7, 50)
    b = a + tokens * random.normal(0.02, 0.05, 50)  # nearly the same, row by row
    drawn = replicates(np.stack([a, b], axis=1), np.stack([tokens, tokens], axis=1))
    scipys = stats.bootstrap(
        (a, b, tokens),
        lambda a, b, tokens, axis=-1: ratio(a, tokens, axis) - ratio(b, tokens, axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = interval(drawn[:, 0] - drawn[:, 1])
    assert found == pytest.approx((scipys.low, scipys.high), rel=1e-9)
    apart = np.hypot(*(np.subtract(*interval(drawn[:, k])) for k in (0, 1)))
    assert found[1] - found[0] < apart / 5  # what pairing is for


def test_about_95_of_100_intervals_hold_the_truth():
    random = np.random.default_rng(7)
    held = 0
    for seed in range(100):
        scores = (random.random(60) < 0.7).astype(float)[:, None]
        low, high = interval(replicates(scores, np.ones_like(scores), seed)[:, 0])
        held += low <= 0.7 <= high
    assert 88 <= held <= 99


def test_memory_stays_flat_and_blocks_change_nothing(monkeypatch):
    random = np.random.default_rng(8)
    sums, tokens = random.random((20_000, 1)), np.ones((20_000, 1))
    tracemalloc.start()
    monkeypatch.setattr(intervals, "DRAWS", 200_000)
    small = replicates(sums, tokens)
    assert tracemalloc.get_traced_memory()[1] < 20e6  # all draws at once would be 320 MB
    tracemalloc.stop()
    monkeypatch.setattr(intervals, "DRAWS", 500_000)
    np.testing.assert_allclose(replicates(sums, tokens), small, rtol=1e-12)


def test_a_loss_that_is_no_number_has_no_interval():
    sums = np.array([[1.0], [np.nan], [2.0]])
    assert np.isnan(interval(replicates(sums, np.ones_like(sums))[:, 0])).all()
