"""What was measured: the runs of both sides, their medians, ratios and spread; plain values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mlxlora.bench.job import OURS, Decoded, Job, Model, Trained


@dataclass(frozen=True)
class Ratio:
    """mlxlora's figure divided by the other side's of the same round, over the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Figure:
    """One quantity of every side: the median over the rounds."""

    key: str
    values: dict[str, float]  # side -> median
    ratio: Ratio | None  # None without another side


@dataclass(frozen=True)
class Training:
    """A workload, trained by every side in every round."""

    job: Job
    about: str  # the workload in words
    runs: dict[str, tuple[Trained, ...]]  # side -> one per round
    out_of_memory: tuple[str, ...] = ()  # sides that this machine is too small for

    @property
    def one(self) -> Trained:
        """Any run: the rows and the model are the same in all."""
        return self.runs[OURS][0]

    @property
    def matrix_rate(self) -> float:
        """Operations per second of a plain matrix product, the median of all processes."""
        return median(run.matrix_rate for runs in self.runs.values() for run in runs)

    def figures(self) -> list[Figure]:
        updates = self.job.updates
        found = [
            _figure("tokens_per_second", self.runs, lambda t: t.supervised / t.seconds),
            _figure("seconds_per_update", self.runs, lambda t: t.seconds / updates),
            _figure("peak_memory", self.runs, lambda t: t.peak_memory),
        ]
        if self.one.operations:
            share = _figure("share_of_limit", self.runs, lambda t: t.share_of_limit or 0.0)
            found.append(Figure(share.key, share.values, None))  # its ratio is that of the speeds
        return found

    def loss_differences(self) -> list[float]:
        """Relative difference between the sides' losses at each update; [] without another side."""
        ours = self.one.losses
        others = [runs[0].losses for side, runs in self.runs.items() if side != OURS]
        return [abs(a - b) / abs(b) for other in others for a, b in zip(ours, other, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "workload": self.job.workload,
            "batch": self.job.batch,
            "updates": self.job.updates,
            "checkpoint_blocks": self.job.checkpoint_blocks,
            "tokens": self.one.tokens,
            "supervised_tokens": self.one.supervised,
            "operations": self.one.operations or None,
            "matrix_rate": self.matrix_rate,
            "out_of_memory": self.out_of_memory,
            "losses": {side: runs[0].losses for side, runs in self.runs.items()},
            "loss_difference": max(self.loss_differences(), default=None),
            **_sides(self.figures(), self.runs),
        }


@dataclass(frozen=True)
class Decoding:
    """One prompt, continued by every side in every round."""

    runs: dict[str, tuple[Decoded, ...]]  # side -> one per round

    @property
    def one(self) -> Decoded:
        return self.runs[OURS][0]

    def figures(self) -> list[Figure]:
        return [
            _figure("tokens_per_second", self.runs, lambda d: d.rate),
            _figure("peak_memory", self.runs, lambda d: d.peak_memory),
        ]

    @property
    def same_tokens(self) -> bool:
        """Whether every side wrote the same. Where two tokens tie, rounding decides."""
        return len({runs[0].tokens for runs in self.runs.values()}) == 1

    def to_dict(self) -> dict[str, Any]:
        figures = _sides(self.figures(), self.runs)
        return {"tokens": len(self.one.tokens), "same_tokens": self.same_tokens, **figures}


@dataclass(frozen=True)
class Report:
    rank: int
    rounds: int
    against: str  # the other side, or "none"
    training: tuple[Training, ...]
    decoding: Decoding | None

    @property
    def model(self) -> Model:
        measured = self.training[0] if self.training else self.decoding
        assert measured is not None
        return measured.one.model

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "weights": self.model.weights,
            "dtype": self.model.dtype,
            "bits": self.model.bits,
            "device": self.model.device,
            "rank": self.rank,
            "rounds": self.rounds,
            "against": self.against,
            "training": [training.to_dict() for training in self.training],
            "decoding": self.decoding.to_dict() if self.decoding else None,
        }


def _figure(key: str, runs: Mapping[str, Sequence[Any]], value: Callable[[Any], float]) -> Figure:
    every = {side: [value(run) for run in found] for side, found in runs.items()}
    ratio = None
    for side in every.keys() - {OURS}:
        found = [a / b for a, b in zip(every[OURS], every[side], strict=True)]
        ratio = Ratio(median(found), min(found), max(found))
    return Figure(key, {side: median(values) for side, values in every.items()}, ratio)


def _sides(figures: Sequence[Figure], sides: Mapping[str, Any]) -> dict[str, Any]:
    """{side: {key: value}, ..., "ratios": {key: {median, least, most}}}."""
    by_side = {side: {figure.key: figure.values[side] for figure in figures} for side in sides}
    return {**by_side, "ratios": {f.key: vars(f.ratio) for f in figures if f.ratio}}
