"""The curves of runs as plots: what one run did, and several over each other."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mlxlora.report.plots import Line, plot
from mlxlora.runs import Run
from mlxlora.train.events import Eval, Step

WINDOWS = 20  # of which one is what a smoothed value is the mean of


@dataclass(frozen=True)
class Curve:
    title: str
    svg: str
    note: str = ""


def curves(run: Run) -> list[Curve]:
    """Of one run: losses, learning rate, gradient norm, speed and memory."""
    steps = run.every(Step)
    if not steps:
        return []
    x = [step.update for step in steps]
    found = [_losses(run, steps, x)]
    clip = run.config.train.clip
    for title, what, lines in (
        ("Learning rate", "learning rate", [Line("", x, [s.learning_rate for s in steps])]),
        ("Gradient norm", "norm before clipping", list(_norms(steps, x, clip))),
        ("Speed", "supervised tokens / s", list(_speed(steps, x))),
        ("Memory", "GB at most so far", [Line("", x, [s.peak_memory / 1e9 for s in steps])]),
    ):
        found.append(Curve(title, plot(lines, what, title, width=5.0)))
    return found


def _losses(run: Run, steps: Sequence[Step], x: Sequence[int]) -> Curve:
    raw = [step.loss for step in steps]
    lines = [Line("", x, raw, 0, "faint"), Line("training, smoothed", x, smoothed(raw), 0)]
    checks = run.every(Eval)
    if checks:
        valid = [check.loss for check in checks]
        lines.append(Line("validation", [c.update for c in checks], valid, 1, "points"))
    if run.best is not None:
        lines.append(Line("best", [run.best.update], [run.best.loss], 1, "best"))
    return Curve("Loss", plot(lines, "nats per supervised token", "loss", width=10.4))


def _norms(steps: Sequence[Step], x: Sequence[int], clip: float) -> Iterator[Line]:
    yield Line("", x, [step.grad_norm for step in steps])
    if clip:
        yield Line("clipped above", [x[0], x[-1]], [clip, clip], 1, "dashed")


def _speed(steps: Sequence[Step], x: Sequence[int]) -> Iterator[Line]:
    rates = [step.tokens / max(step.seconds, 1e-9) for step in steps]
    yield Line("", x, rates, 0, "faint")
    yield Line("", x, smoothed(rates), 0)


def overlaid(runs: Sequence[Run]) -> list[Curve]:
    """Several runs over each other: validation loss, and smoothed training loss."""
    valid, train = [], []
    for number, run in enumerate(runs):
        checks, steps = run.every(Eval), run.every(Step)
        if checks:
            losses = [check.loss for check in checks]
            valid.append(Line(run.name, [c.update for c in checks], losses, number, "points"))
        if steps:
            losses = smoothed([step.loss for step in steps])
            train.append(Line(run.name, [s.update for s in steps], losses, number))
    found = []
    for title, lines in (("Validation loss", valid), ("Training loss, smoothed", train)):
        if lines:
            svg = plot(lines, "nats per supervised token", title, width=10.4)
            found.append(Curve(title, svg))
    return found


def smoothed(values: Sequence[float]) -> list[float]:
    """Each the mean of those around it, as many on either side; what is no number is left out."""
    half = max(2, len(values) // (2 * WINDOWS))
    known = [value if math.isfinite(value) else 0.0 for value in values]
    sums = list(accumulate(known, initial=0.0))
    counts = list(accumulate((math.isfinite(value) for value in values), initial=0))
    found = []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        first, last = place - reach, place + reach + 1
        count = counts[last] - counts[first]
        found.append((sums[last] - sums[first]) / count if count else math.nan)
    return found
