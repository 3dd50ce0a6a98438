"""Whether mlx-lm decodes several requests of a model together as it does each alone: tried out.

Not all of its models do. Some recurrent ones run the padding of shorter prompts through their
state (mamba), and some masks are not made for a batch (gemma2). What such a model cannot do
together, it is to do one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator

from mlxlora.base import Base
from mlxlora.errors import ModelError

LENGTHS = (2, 5)  # tokens of the prompts that are tried
DECODED = 5  # tokens of each answer; so many that both answers are decoded together
AGREES = 0.05  # of the spread of log-probabilities; padding that is not masked moves them by more


@dataclass(frozen=True)
class Together:
    """How many rows at most: decoded, and prompts of different lengths read."""

    rows: int
    prompts: int


def together(base: Base, rows: int) -> Together:
    """What the bare base can do of so many rows. Raises ModelError if not even one."""
    model = base.model
    try:
        alone = [_tried(model, [length], 1)[0] for length in LENGTHS]
    except (ValueError, TypeError) as error:  # of caches that cannot be merged or taken apart
        raise ModelError(
            f"{base.path}: mlx-lm's batches cannot decode this model, so it cannot be served "
            f"({error})"
        ) from error
    for prompts in (rows, 1):
        if rows > 1 and _agree(model, prompts, alone):
            return Together(rows, prompts)
    return Together(1, 1)


def _agree(model: nn.Module, prompts: int, alone: list[mx.array]) -> bool:
    try:
        mixed = _tried(model, LENGTHS, prompts)
        return all(_close(a, b) for a, b in zip(mixed, alone, strict=True))
    except (ValueError, RuntimeError):  # shapes that do not fit
        return False


def _tried(model: nn.Module, lengths: Sequence[int], prompts: int) -> list[mx.array]:
    """The log-probabilities (DECODED, V) of each answer, whose tokens are forced."""
    generator = BatchGenerator(
        model,
        sampler=lambda logprobs: mx.full(logprobs.shape[0], 1, mx.uint32),
        completion_batch_size=len(lengths),
        prefill_batch_size=min(prompts, len(lengths)),
    )
    generator.close()  # it has wired memory, see lane.py
    numbers = generator.insert(
        [list(range(1, length + 1)) for length in lengths], [DECODED] * len(lengths)
    )
    told: dict[int, list[mx.array]] = {number: [] for number in numbers}
    while any(len(rows) < DECODED for rows in told.values()):
        for response in generator.next()[1]:
            told[response.uid].append(response.logprobs.astype(mx.float32))
    return [mx.stack(told[number]) for number in numbers]


def _close(a: mx.array, b: mx.array) -> bool:
    spread = mx.maximum(mx.std(b), 1e-6)
    return bool((mx.sqrt(mx.square(a - b).mean()) <= AGREES * spread).item())
