"""The course of a run while it goes: smoothed figures, curves in a few columns, the time left.

Only numbers, from events; display.py shows them.
"""

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from mlxlora.train.events import Eval, Saved, Start, Step

SMOOTHING = 0.8  # of the loss and the rate shown, per update
RECENT = 50  # updates whose time tells how long the others will take


class Course:
    """What the events of one process have told so far."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.update = 0
        self.epoch = 0.0
        self.loss = self.rate = math.nan  # smoothed; nats, supervised tokens per second
        self.learning_rate = self.grad_norm = 0.0
        self.peak_memory = 0  # bytes
        self.losses: list[float] = []  # smoothed, an entry an update from the first one seen
        self.validations: list[Eval] = []
        self._seconds: list[float] = []  # of the last updates
        self._save_at = time.monotonic() + start.saves_in

    def step(self, event: Step) -> None:
        self.update, self.epoch = event.update, event.epoch
        self.learning_rate, self.grad_norm = event.learning_rate, event.grad_norm
        self.peak_memory = event.peak_memory
        self._seconds = [*self._seconds[1 - RECENT :], event.seconds]
        if event.tokens and math.isfinite(event.loss):
            rate = event.tokens / max(event.seconds, 1e-9)
            self.loss = _smooth(self.loss, event.loss)
            self.rate = _smooth(self.rate, rate)
            self.losses.append(self.loss)

    def validated(self, event: Eval) -> None:
        self.validations.append(event)

    def saved(self, event: Saved) -> None:
        if event.why == "checkpoint":
            self._save_at = time.monotonic() + event.next_in

    def curves(self, count: int) -> tuple[list[float], list[float]]:
        """Smoothed training loss and the validation loss as it was then, in count columns."""
        train = columns(self.losses, count)
        first = self.update - len(self.losses)
        ends = [first + len(self.losses) * (n + 1) / len(train) for n in range(len(train))]
        checks = [(eval_.update, eval_.loss) for eval_ in self.validations]
        valid = [
            next((loss for update, loss in reversed(checks) if update <= end), math.nan)
            for end in ends
        ]
        return train, valid

    @property
    def best(self) -> Eval | None:
        return next((eval_ for eval_ in reversed(self.validations) if eval_.best), None)

    @property
    def next_validation(self) -> int:
        """The update after which the next validation comes; 0: there is none."""
        every = self.start.validates_every
        return min((self.update // every + 1) * every, self.start.updates) * self._validates

    @property
    def _validates(self) -> bool:
        return self.start.valid_rows > 0 and self.update < self.start.updates

    def seconds_until(self, update: int) -> float:
        """About how long the updates up to this one take, validations on the way included."""
        if not self._seconds:
            return math.nan
        every = self.start.validates_every
        passed = (update - 1) // every - self.update // every if self._validates else 0
        checks = [eval_.seconds for eval_ in self.validations]
        return (update - self.update) * median(self._seconds) + passed * median(checks or [0.0])

    @property
    def seconds_left(self) -> float:
        last = self.validations[-1].seconds if self.validations and self._validates else 0.0
        return self.seconds_until(self.start.updates) + last

    @property
    def next_save(self) -> float:
        """Seconds until the next checkpoint, apart from those that come with a new best."""
        every = self.start.saves_every
        if every:
            return self.seconds_until((self.update // every + 1) * every)
        return max(0.0, self._save_at - time.monotonic())


def _smooth(old: float, new: float) -> float:
    return new if math.isnan(old) else SMOOTHING * old + (1 - SMOOTHING) * new


def columns(values: Sequence[float], count: int) -> list[float]:
    """At most count values: each the mean of its share of all of them, in order."""
    if len(values) <= count:
        return list(values)
    edges = [round(number * len(values) / count) for number in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
