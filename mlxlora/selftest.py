"""A second of training on a tiny random model in memory: whether this installation can train.

It goes the way of every run (low-rank layers, packing, head, optimizer), on the device that runs
use. The speed is that of the tiny model; `mlxlora bench` measures real shapes.
"""

import time
from dataclasses import dataclass

import numpy as np

from mlxlora.base import training_mode
from mlxlora.bench.shapes import SHAPES, build
from mlxlora.config import LoraConfig, TrainConfig
from mlxlora.data.batches import pack
from mlxlora.data.render import Example
from mlxlora.lora.fresh import new_layers
from mlxlora.train.optim import make_optimizer
from mlxlora.train.step import Stepper

SECONDS = 1.0
LEAST, MOST = 4, 200  # updates
ROWS, LENGTH = 4, 32
RATE = 2e-2


@dataclass(frozen=True)
class Training:
    """What a few updates did."""

    updates: int
    before: float  # loss of the first update
    after: float  # loss of the last
    rate: float  # tokens per second, the first update (which compiles) not counted

    @property
    def learns(self) -> bool:
        return self.after < self.before - 0.1  # of about 6.2; no noise, it is always the same batch


def train_a_second() -> Training:
    """Train on one update's rows again and again, for about a second."""
    model = build(SHAPES["tiny"], bits=0)
    new_layers(model, LoraConfig(rank=4, alpha=8), seed=0)
    stepper = Stepper(model, make_optimizer(TrainConfig()), clip=1.0)
    batch = pack(_rows())
    losses: list[float] = []
    began = time.perf_counter()
    with training_mode(model):
        while len(losses) < LEAST or (time.perf_counter() - began < SECONDS and len(losses) < MOST):
            losses.append(stepper.step((batch,), 0, len(losses) + 1, RATE)[0])
            if len(losses) == 1:
                began = time.perf_counter()
    rate = (len(losses) - 1) * ROWS * LENGTH / (time.perf_counter() - began)
    return Training(len(losses), losses[0], losses[-1], rate)


def _rows() -> list[Example]:
    """Rows that count upwards, each from a place of its own."""
    words = SHAPES["tiny"]["vocab_size"]
    starts = np.arange(ROWS) * (words // ROWS)
    counts = (starts[:, None] + np.arange(LENGTH + 1)).astype(np.int32) % words
    return [Example(row, tokens, np.ones(LENGTH + 1, bool)) for row, tokens in enumerate(counts)]
