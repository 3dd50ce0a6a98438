"""What one fresh process is asked to measure, and what it answers: plain values, as JSON."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Self

OURS, MLX_LM = "mlxlora", "mlx-lm"


@dataclass(frozen=True)
class Job:
    """One measurement of one side."""

    side: str  # OURS or MLX_LM
    shape: str  # a name of SHAPES, or "" for the model in path
    path: str  # a model directory, or ""
    bits: int  # to quantize to, or 0
    rank: int
    workload: str  # a name of WORKLOADS, or "" to decode
    batch: int = 0  # rows per optimizer update
    updates: int = 0  # done twice: to warm up, then measured
    checkpoint_blocks: bool = False  # blocks are computed again in the backward pass

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Model:
    """What was measured with."""

    name: str
    weights: int  # packed ones counted as if they were not
    dtype: str  # of the activations
    bits: int
    device: str


@dataclass(frozen=True)
class Trained:
    """One process's measured pass over the updates."""

    model: Model
    losses: tuple[float, ...]  # mean per supervised token, of each update, both passes
    seconds: float  # of the measured pass
    peak_memory: int  # bytes, during the measured pass
    tokens: int  # predictions in the rows, padding not counted
    supervised: int  # tokens that are trained
    operations: int  # necessary floating-point operations; 0: not known for this family
    matrix_rate: float  # operations per second of a plain matrix product, same process

    @property
    def share_of_limit(self) -> float | None:
        """Time that the necessary operations take at the matrix rate, as a share of what it was."""
        if not self.operations:
            return None
        return self.operations / self.matrix_rate / self.seconds


@dataclass(frozen=True)
class Decoded:
    """One process's greedy continuation of a prompt."""

    model: Model
    tokens: tuple[int, ...]
    seconds: float  # from the first token to the last
    peak_memory: int  # bytes

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (len(self.tokens) - 1) / self.seconds


def answer_of(kind: type[Any], value: dict[str, Any]) -> Any:
    """A Trained or Decoded back from its JSON."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return kind(**{**values, "model": Model(**value["model"])})
