"""What an update holds and how long it takes, found by doing one with a few blocks of the model.

An update with few blocks, one with more blocks of each kind and one with more words tell what
each of them adds; the rest follows, because blocks of a kind are alike. What is measured is
MLX's own record of its memory. Where a micro-batch of the size asked for would take too long
(CPU_WORK), a smaller one is computed, and what it holds per token counts.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxlora.base import training_mode
from mlxlora.config import TrainConfig
from mlxlora.data.batches import Batch, Size
from mlxlora.data.layout import Layout
from mlxlora.data.render import Example
from mlxlora.machine import on_cpu
from mlxlora.train.forward import Forward
from mlxlora.train.logprobs import block_size
from mlxlora.train.optim import make_optimizer
from mlxlora.train.step import Stepper
from mlxlora.train.thin import Fill, kinds_of_blocks, thin, words_of

# Blocks to begin with. Those computed again meet each other's temporary arrays.
START = {False: 2, True: 3}
MORE = 2  # blocks by which the second update is larger
CHUNKS = 4  # blocks of logits that are enough to be like many
FEW_WORDS = 1024
TINY = (8, 4)  # size of a row too small to matter
# A probe takes about a second: on the CPU so many multiplications and additions, and no more
# tokens, since small models spend their time on other things.
CPU_WORK, CPU_TOKENS, LEAST_TOKENS = 5e10, 2048, 64
GPU_TOKENS = 4096


@dataclass(frozen=True)
class Need:
    """What a micro-batch of so many tokens needs besides what is always there."""

    tokens: int
    activations: int  # bytes kept for the backward pass, all blocks
    working: int  # bytes that come and go meanwhile
    update: int  # bytes that come and go while the optimizer works
    seconds: float  # of the micro-batch
    seconds_update: float  # of the optimizer

    @property
    def bytes(self) -> int:
        return max(self.activations + self.working, self.update)


@dataclass(frozen=True)
class _Reading:
    bytes: float  # while gradients are computed
    update: float  # bytes while the optimizer works
    seconds: float
    seconds_update: float

    def __add__(self, other: "_Reading") -> "_Reading":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Reading(*(a + b for a, b in pairs))

    def __mul__(self, factor: float) -> "_Reading":
        return _Reading(*(factor * value for value in vars(self).values()))

    def at_least_nothing(self) -> "_Reading":
        return _Reading(*(max(0.0, value) for value in vars(self).values()))

    def __sub__(self, other: "_Reading") -> "_Reading":
        return self + other * -1.0


class Prober:
    """Finds what micro-batches of a model need; the model is as it was after each call.

    forward: what was found out about the model. fill: makes up the weights of a skeleton.
    """

    def __init__(
        self, model: nn.Module, forward: Forward, train: TrainConfig, fill: Fill | None = None
    ) -> None:
        self._model, self._forward, self._train, self._fill = model, forward, train, fill
        self._kinds = kinds_of_blocks(model)
        self._words = words_of(model)
        self._at_once = 1  # micro-batches of an update, as far as they meet

    def __call__(self, sizes: Sequence[Size], layout: Layout, checkpoint_blocks: bool) -> Need:
        """The need of the largest micro-batch that rows of these sizes make in this layout."""
        batches = cut(sizes, layout)
        batch, self._at_once = largest(batches), min(2, len(batches))
        tokens, affordable = batch.inputs.size, self._affordable() // self._at_once
        probed = batch if tokens <= affordable else _smaller(sizes, affordable)
        share = tokens / probed.inputs.size

        words = self._few_words(len(probed.positions))
        few = self._kinds[0][: START[checkpoint_blocks]]
        one = self._read(few, words, probed, checkpoint_blocks)
        blocks = each = _Reading(0, 0, 0, 0)  # all that are differentiated; one of the first kind
        for number, kind in enumerate(self._kinds):
            others = [b for b in kind if not any(b is known for known in few)] or kind
            many = [*few, *(others * MORE)[:MORE]]
            more = self._read(many, words, probed, checkpoint_blocks)
            added = (more - one).at_least_nothing() * (1 / MORE)
            blocks = blocks + added * len(kind)
            each = added if number == 0 else each
        whole = one - each * len(few) + blocks
        if words < self._words:
            added_words = min(words, self._words - words)
            # With more blocks, because an optimizer with little else to do holds more of the words.
            wide = self._read(many, words + added_words, probed, checkpoint_blocks)
            by_words = (wide - more) * ((self._words - words) / added_words)
            if self._forward.head is not None:  # logits come by blocks: no more at once
                by_words = replace(by_words, bytes=0.0, update=0.0)
            whole = whole + by_words
        working = whole.bytes - blocks.bytes
        if share > 1:  # what is cut in blocks grows no more, what a block keeps does
            working += each.bytes * (share - 1)
        below = len(self._model.layers) - sum(map(len, self._kinds))
        seconds = whole.seconds + below / 3 * each.seconds
        return Need(
            tokens,
            int(blocks.bytes * share),
            max(0, int(working)),
            int(whole.update),
            seconds * share,
            whole.seconds_update,
        )

    def _few_words(self, supervised: int) -> int:
        head = self._forward.head
        few = FEW_WORDS if head is None else max(FEW_WORDS, CHUNKS * block_size(head, supervised))
        return self._words if 2 * few > self._words else few

    def _affordable(self) -> int:
        """Tokens of which a few updates with a few blocks take about a second."""
        if not on_cpu():
            return GPU_TOKENS
        largest_block = max(_weights(kind[0]) for kind in self._kinds)
        work = CPU_WORK / (6 * (START[False] + MORE) * largest_block)
        return int(min(CPU_TOKENS, max(LEAST_TOKENS, work)))

    def _read(
        self, blocks: Sequence[nn.Module], words: int, batch: Batch, checkpoint_blocks: bool
    ) -> _Reading:
        tiny = cut([TINY], Layout(TINY[0], packed=batch.inputs.shape[0] == 1))
        with thin(self._model, blocks, words, self._fill), training_mode(self._model):
            forward = _over(self._forward, self._model, checkpoint_blocks)
            stepper = Stepper(self._model, make_optimizer(self._train), self._train.clip, forward)
            self._measure(stepper, tiny)  # whatever is made once, is made
            update, seconds_update = self._measure(stepper, tiny)
            if not on_cpu():
                self._measure(stepper, [batch])  # compiled
            # The second is on its way before the first is done. How far ahead MLX gets depends on
            # what else the machine does: the most of two, the shorter time.
            both = [self._measure(stepper, [batch] * self._at_once) for _ in range(2)]
            most, seconds = max(m for m, _ in both), min(s for _, s in both)
            del stepper, forward
        mx.clear_cache()
        return _Reading(most, update, (seconds - seconds_update) / self._at_once, seconds_update)

    def _measure(self, stepper: Stepper, batches: list[Batch]) -> tuple[float, float]:
        """(bytes held at most beyond those before, seconds) of an update."""
        mx.synchronize()
        mx.reset_peak_memory()
        before, began = mx.get_active_memory(), time.perf_counter()
        stepper.step(tuple(batches), 0, 1, 0.0)
        mx.synchronize()
        return mx.get_peak_memory() - before, time.perf_counter() - began


def cut(sizes: Sequence[Size], layout: Layout) -> list[Batch]:
    """The micro-batches that rows of these sizes (predictions, supervised) make."""
    return layout.cut(_example(number, size) for number, size in enumerate(sizes))


def largest(batches: Sequence[Batch]) -> Batch:
    return max(batches, key=lambda batch: (batch.inputs.size, len(batch.positions)))


def _example(number: int, size: Size) -> Example:
    """A row of this size; its words are few, because the probed model has few."""
    length, supervised = size
    mask = np.arange(length + 1) > length - supervised
    return Example(number, np.arange(length + 1, dtype=np.int32) % 64, mask)


def _smaller(sizes: Sequence[Size], tokens: int) -> Batch:
    """A packed micro-batch of at most so many tokens, of rows like these cut short."""
    share = tokens / max(tokens, *(length for length, _ in sizes))
    short = [(max(2, int(n * share)), max(1, int(s * share))) for n, s in sizes]
    return largest(cut(short, Layout(tokens, packed=True)))


def _over(forward: Forward, model: nn.Module, checkpoint_blocks: bool) -> Forward:
    """The same findings for the model as it is now."""
    found = copy.copy(forward)
    found.model, found.checkpoint_blocks = model, checkpoint_blocks
    if found.head is not None:
        layer = dict(model.named_modules())[found.head.path]
        found.head = replace(found.head, model=model, layer=layer)
    return found


def _weights(block: nn.Module) -> int:
    """Numbers in the block that a token is multiplied with, packed ones as they are."""
    return max(1, sum(a.size for _, a in tree_flatten(block.parameters()) if a.ndim > 1))
