"""The optimizer, its learning rate at every update, and clipping.

Schedules count optimizer updates and are plain functions of the update's number, so a rate
depends on nothing that would have to be saved.
"""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as opt
from mlx.utils import tree_flatten

from mlxlora.config import LoraConfig, TrainConfig
from mlxlora.errors import ConfigError

LARGE = 14_000_000_000  # parameters from which the default rate is halved
FINAL_SHARE = 0.1  # of the peak, at the end of the cosine

MUON_REST = 0.2  # of the rate, for what Muon does not train


class Muon(opt.MultiOptimizer):
    """Muon for matrices; AdamW, at a fifth of the rate, for vectors, embeddings and experts.

    Muon orthogonalizes the update of a matrix between hidden spaces (Jordan et al. 2024);
    other parameters have no such structure.
    """

    def __init__(self, weight_decay: float) -> None:
        rest = opt.AdamW(0.0, weight_decay=weight_decay, bias_correction=True)
        super().__init__([opt.Muon(0.0, weight_decay=weight_decay), rest], [_is_hidden_matrix])

    @property
    def learning_rate(self) -> mx.array:
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self.optimizers[0].learning_rate = rate
        self.optimizers[1].learning_rate = MUON_REST * rate


class LoraPlus(opt.MultiOptimizer):
    """B learns ratio times as fast as everything else (Hayou et al. 2024, arXiv:2402.12354)."""

    def __init__(self, of_b: opt.Optimizer, rest: opt.Optimizer, ratio: float) -> None:
        super().__init__([of_b, rest], [lambda path, _: path.endswith(".lora_b")])
        self._ratio = ratio

    @property
    def learning_rate(self) -> mx.array:
        return self.optimizers[1].learning_rate

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self.optimizers[0].learning_rate = self._ratio * rate
        self.optimizers[1].learning_rate = rate


def _is_hidden_matrix(path: str, weight: mx.array) -> bool:
    return weight.ndim == 2 and not any(name in path for name in ("embed", "lm_head"))


# A new optimizer is one line: name -> (config -> MLX optimizer).
OPTIMIZERS: dict[str, Callable[[TrainConfig], opt.Optimizer]] = {
    "adamw": lambda c: opt.AdamW(0.0, weight_decay=c.weight_decay, bias_correction=True),
    "adam": lambda c: opt.Adam(0.0, bias_correction=True),
    "lion": lambda c: opt.Lion(0.0, weight_decay=c.weight_decay),
    "adafactor": lambda c: opt.Adafactor(
        0.0, relative_step=False, scale_parameter=False, weight_decay=c.weight_decay
    ),
    "sgd": lambda c: opt.SGD(0.0, weight_decay=c.weight_decay),
    "muon": lambda c: Muon(c.weight_decay),
}

# name -> share of the peak rate at update 0..n after warmup; 0 only after the last
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda k, n: FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * k / n)) / 2,
    "linear": lambda k, n: 1 - k / (n + 1),
    "constant": lambda k, n: 1.0,
}


def make_optimizer(config: TrainConfig) -> opt.Optimizer:
    """The optimizer, its rate still 0. Raises ConfigError for what it cannot honour."""
    if config.optimizer == "adam" and config.weight_decay:
        raise ConfigError("train.optimizer = 'adam' knows no weight_decay; use 'adamw'")
    make = OPTIMIZERS[config.optimizer]
    if config.lora_plus_ratio == 1:
        return make(config)
    return LoraPlus(make(config), make(config), config.lora_plus_ratio)


def peak_rate(train: TrainConfig, lora: LoraConfig, parameters: int) -> float:
    """train.learning_rate, or the default for this method and size of model."""
    if train.learning_rate:
        return train.learning_rate
    if lora.method == "full":
        return 2e-5
    return 1e-4 if parameters >= LARGE else 2e-4


def learning_rate(config: TrainConfig, peak: float, update: int, updates: int) -> float:
    """The rate of update 1..updates: linear warmup, then the schedule."""
    warmup = config.warmup if config.warmup >= 1 else round(config.warmup * updates)
    if update <= warmup:
        return peak * update / warmup
    after = max(1, updates - round(warmup))
    return peak * SCHEDULES[config.schedule](min(update - round(warmup), after), after)


def global_norm(gradients: dict[str, object]) -> mx.array:
    """The Euclidean norm over all gradients together, float32."""
    leaves = [g for _, g in tree_flatten(gradients)]
    return mx.sqrt(sum((g.astype(mx.float32).square().sum() for g in leaves), mx.array(0.0)))
