"""What was measured of serving: rates and waits of both servers, ratios within a round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mlxlora.bench.job import OURS, Model
from mlxlora.bench.load import Measured, Setting
from mlxlora.bench.report import Ratio

ONE, MIXED, STREAM = "one adapter", "adapters mixed", "one stream"
Round = Mapping[tuple[str, int], Measured]  # (a setting's key, clients) -> what was seen
MEDIAN, MOST = 0.5, 0.95  # shares of the requests


@dataclass(frozen=True)
class Row:
    """One setting at one server: medians over the rounds."""

    side: str
    setting: Setting
    requests_per_second: float
    tokens_per_second: float  # generated
    total_tokens_per_second: float  # with those of the prompts
    first_token: float  # seconds, the median request
    first_token_95: float  # seconds, not exceeded by 95 % of the requests
    decoding_rate: float  # of one answer, tokens per second after the first
    cut_short: int  # rounds in which time ran out

    def to_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k != "setting"}
        setting = self.setting
        return {
            "setting": setting.key,
            "clients": setting.clients,
            "adapters": len(setting.adapters),
            "requests": setting.requests,
            "max_tokens": setting.max_tokens,
            **own,
        }


@dataclass(frozen=True)
class Compared:
    """One ratio, taken within every round."""

    of: str  # what is divided by what
    clients: int
    ratio: Ratio

    def to_dict(self) -> dict[str, Any]:
        return {"of": self.of, "clients": self.clients, **vars(self.ratio)}


@dataclass(frozen=True)
class Serving:
    """The rounds of every side."""

    model: Model
    rank: int
    against: str  # the other side, or "none"
    limit: float  # seconds that a setting may take
    same_answers: tuple[int, int] | None  # of so many, all by so many; None without another side
    rounds: Mapping[str, Sequence[Round]]  # side -> one per round

    def rows(self) -> list[Row]:
        """Settings in their order, the sides of each below each other."""
        first = next(iter(self.rounds.values()))[0]
        return [
            _row(side, [found[key] for found in rounds])
            for key in first
            for side, rounds in self.rounds.items()
        ]

    def ratios(self) -> list[Compared]:
        ours = self.rounds[OURS]
        others = [rounds for side, rounds in self.rounds.items() if side != OURS]
        clients = sorted({count for key, count in ours[0] if key == MIXED})

        def rate(key: str, count: int) -> Callable[[Round], float]:
            return lambda found: found[key, count].tokens_per_second

        found = [
            Compared(
                f"{OURS}: {MIXED} / {ONE}",
                count,
                _ratio(map(rate(MIXED, count), ours), map(rate(ONE, count), ours)),
            )
            for count in clients
        ]
        for other in others:
            for key in (MIXED, ONE):
                found += [
                    Compared(
                        f"{OURS} / {self.against}: {key}",
                        count,
                        _ratio(map(rate(key, count), ours), map(rate(key, count), other)),
                    )
                    for count in clients
                ]
            rates = [[one[STREAM, 1].decoding_rate for one in side] for side in (ours, other)]
            found.append(Compared(f"{OURS} / {self.against}: {STREAM}", 1, _ratio(*rates)))
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "weights": self.model.weights,
            "dtype": self.model.dtype,
            "bits": self.model.bits,
            "device": self.model.device,
            "rank": self.rank,
            "rounds": len(self.rounds[OURS]),
            "against": self.against,
            "limit": self.limit,
            "same_answers": self.same_answers,
            "serving": [row.to_dict() for row in self.rows()],
            "ratios": [compared.to_dict() for compared in self.ratios()],
        }


def _row(side: str, runs: Sequence[Measured]) -> Row:
    return Row(
        side,
        runs[0].setting,
        requests_per_second=median(run.requests_per_second for run in runs),
        tokens_per_second=median(run.tokens_per_second for run in runs),
        total_tokens_per_second=median(run.total_tokens_per_second for run in runs),
        first_token=median(run.wait(MEDIAN) for run in runs),
        first_token_95=median(run.wait(MOST) for run in runs),
        decoding_rate=median(run.decoding_rate for run in runs),
        cut_short=sum(not run.complete for run in runs),
    )


def _ratio(above: Any, below: Any) -> Ratio:
    found = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(median(found), min(found), max(found))
