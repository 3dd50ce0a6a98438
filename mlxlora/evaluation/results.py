"""One model's figures on a file of rows, and the standing of several beside each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Literal, cast

import numpy as np

from mlxlora.evaluation.answers import Answer
from mlxlora.evaluation.intervals import FEWEST_ROWS, Interval, interval, replicates
from mlxlora.evaluation.losses import Losses
from mlxlora.files import finite

LOSS, EXACT = "loss", "exact"
Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Estimate:
    """A metric's mean over rows and its 95 % interval."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Result:
    """One model's figures. exact_match is a share, None unless it was asked for."""

    name: str
    loss: float
    perplexity: float
    tokens: int  # supervised
    rows: int
    exact_match: float | None = None
    answers: tuple[Answer, ...] = field(default=(), repr=False)
    loss_interval: Interval = (float("nan"), float("nan"))
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    losses: Losses | None = field(default=None, repr=False)  # by row


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows: the verdict is a's standing beside b."""

    metric: str
    a: str
    b: str
    difference: float  # a - b
    interval: Interval  # 95 %, paired
    verdict: Verdict


def estimated(losses: Losses, answers: Sequence[Answer]) -> tuple[Interval, dict[str, Estimate]]:
    """(the interval of the loss, the metrics of the answers)."""
    of_loss = interval(replicates(losses.sums[:, None], losses.tokens[:, None])[:, 0])
    names = list(answers[0].scores) if answers else []
    if not names:
        return of_loss, {}
    scores = np.array([[answer.scores[name] for name in names] for answer in answers])
    drawn = replicates(scores, np.ones_like(scores))
    return of_loss, {
        name: Estimate(float(scores[:, place].mean()), interval(drawn[:, place]))
        for place, name in enumerate(names)
    }


def compare(results: Sequence[Result]) -> list[Comparison]:
    """Every two models, the later beside the earlier, by each figure that both have."""
    return [comparison for name in _figures(results) for comparison in _compared(results, name)]


def _figures(results: Sequence[Result]) -> list[str]:
    return [LOSS, *(results[0].metrics if results else ())]


def _compared(results: Sequence[Result], name: str) -> Iterator[Comparison]:
    """All models by one figure, from the same draws of rows."""
    numerators, denominators = (
        np.stack(column, axis=1) for column in zip(*(_sums(r, name) for r in results), strict=True)
    )
    drawn = replicates(numerators, denominators)
    with np.errstate(invalid="ignore"):
        values = numerators.sum(axis=0) / denominators.sum(axis=0)
        for b, a in combinations(range(len(results)), 2):
            difference = float(values[a] - values[b])
            between = interval(drawn[:, a] - drawn[:, b])
            gain = tuple(-x for x in between[::-1]) if name == LOSS else between
            yield Comparison(
                name,
                results[a].name,
                results[b].name,
                difference,
                between,
                _verdict(gain[0], gain[1], len(numerators)),
            )


def _sums(result: Result, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What a figure sums over rows, and what it divides by: (n,) each, float64."""
    if name == LOSS:
        assert result.losses is not None
        return result.losses.sums, result.losses.tokens.astype(np.float64)
    scores = np.array([answer.scores[name] for answer in result.answers])
    return scores, np.ones_like(scores)


def _verdict(low: float, high: float, rows: int) -> Verdict:
    """low and high bound how much better it is; NaN bounds nothing."""
    if rows < FEWEST_ROWS or not (low > 0 or high < 0):
        return "no difference shown"
    return "better" if low > 0 else "worse"


def as_json(
    model: str, data: str, results: Sequence[Result], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """What `mlxlora eval` prints with --json, and saves."""
    told = {
        "model": model,
        "data": data,
        "results": [_result_json(result) for result in results],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    return cast(dict[str, Any], finite(told))


def _result_json(result: Result) -> dict[str, Any]:
    exact = {} if result.exact_match is None else {"exact_match": result.exact_match}
    return {
        "name": result.name,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "rows": result.rows,
        **exact,
        "loss_interval": list(result.loss_interval),
        "metrics": {name: asdict(estimate) for name, estimate in result.metrics.items()},
    }
