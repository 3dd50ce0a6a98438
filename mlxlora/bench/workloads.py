"""Rows to measure with: random tokens, with the lengths of three kinds of real data.

Speed depends on how long rows are, how much they differ, and what share of them is trained;
not on what they say. Everything is a function of the workload's name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlxlora.data.render import Example

TYPICAL_ROWS = 1000  # drawn to see what lengths a workload has, as training samples its data

Lengths = tuple[np.ndarray, np.ndarray]  # (n,) tokens of each prompt, of each answer


@dataclass(frozen=True)
class Workload:
    """A distribution of rows. Prompts are read, answers are trained."""

    about: str
    longest: int  # tokens of a row, at most
    batch: int  # rows per optimizer update, unless the user says otherwise
    updates: int  # optimizer updates measured, unless the user says otherwise
    lengths: Callable[[np.random.Generator, int], Lengths]


def _log_normal(
    random: np.random.Generator, count: int, mean: float, spread: float, least: int, most: int
) -> np.ndarray:
    """(count,) lengths with this mean before they are clipped; spread is that of the log."""
    drawn = random.lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.clip(drawn.round().astype(int), least, most)


def _answers(random: np.random.Generator, count: int) -> Lengths:
    prompts = _log_normal(random, count, 75, 0.35, 8, 512)
    return prompts, _log_normal(random, count, 106, 0.5, 8, 1024)


def _mixed(random: np.random.Generator, count: int) -> Lengths:
    rows = _log_normal(random, count, 500, 1.0, 32, 2048)  # median 300
    prompts = (rows * random.uniform(0.25, 0.75, count)).astype(int)
    return prompts, rows - prompts


def _long(random: np.random.Generator, count: int) -> Lengths:
    return np.zeros(count, int), np.full(count, 4096)


# A new workload is one function and one line.
WORKLOADS: dict[str, Workload] = {
    "answers": Workload(
        "short questions, worked answers: about 75 + 106 tokens", 2048, 4, 3, _answers
    ),
    "mixed": Workload("32 to 2,048 tokens, most short, some long", 2048, 8, 2, _mixed),
    "long": Workload("4,096 tokens, every one trained", 4096, 1, 2, _long),
}


def updates_of(name: str, batch: int, updates: int, words: int) -> list[list[Example]]:
    """The rows of each optimizer update, in random order of length; tokens are below words."""
    random = np.random.default_rng(0)
    count = batch * updates
    examples = []
    for row, (prompt, answer) in enumerate(
        zip(*WORKLOADS[name].lengths(random, count), strict=True)
    ):
        tokens = random.integers(0, words, prompt + answer, np.int32)
        examples.append(Example(row, tokens, np.arange(prompt + answer) >= prompt))
    return [examples[start : start + batch] for start in range(0, count, batch)]


def typical_sizes(name: str) -> list[tuple[int, int]]:
    """(predictions, supervised ones) of many rows, others than those that are trained."""
    prompts, answers = WORKLOADS[name].lengths(np.random.default_rng(1), TYPICAL_ROWS)
    return [(int(p + a - 1), int(min(a, p + a - 1))) for p, a in zip(prompts, answers, strict=True)]
