"""Bootstrap intervals: how far a figure might lie elsewhere had other such rows been drawn.

Rows are drawn again with replacement, as many as there are, and the figure is computed of each
draw; the middle 95 % of those figures are its interval (the percentile interval of Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). A figure is a ratio of two sums
over rows: losses over tokens, or scores over rows. Figures of several models are computed of the
same draws, so their differences are paired. Rows that are all alike have an interval of no width,
however few they are. What other seeds of training or other wordings of a
prompt would change is not in these intervals.
"""

from collections.abc import Iterator

import numpy as np

Interval = tuple[float, float]

CONFIDENCE = 0.95
RESAMPLES = 2000
DRAWS = 1 << 21  # rows drawn at once, so that memory stays flat
# With few rows that happen to agree, every draw agrees: no difference is claimed of fewer.
FEWEST_ROWS = 10


def replicates(numerators: np.ndarray, denominators: np.ndarray, seed: int = 0) -> np.ndarray:
    """The figures (RESAMPLES, k) of draws of the rows of two matrices (n, k), float64.

    A figure of a draw is the sum of its numerators over that of its denominators.
    """
    with np.errstate(invalid="ignore", divide="ignore"):  # a loss may be no number
        parts = [
            (counts @ numerators) / (counts @ denominators)
            for counts in _counts(len(numerators), seed)
        ]
    return np.concatenate(parts)


def interval(figures: np.ndarray) -> Interval:
    """The middle CONFIDENCE of figures (RESAMPLES,)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(figures, [tail, 1 - tail])
    return float(low), float(high)


def _counts(rows: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, (draws, rows) at a time, RESAMPLES draws in all."""
    random = np.random.default_rng(seed)
    at_once = max(1, DRAWS // rows)
    for start in range(0, RESAMPLES, at_once):
        draws = min(at_once, RESAMPLES - start)
        drawn = random.integers(0, rows, (draws, rows))
        drawn += np.arange(draws)[:, None] * rows
        counts = np.bincount(drawn.ravel(), minlength=draws * rows)
        yield counts.reshape(draws, rows).astype(np.float64)
