"""How updates are cut so that they fit: tokens at once, and whether blocks are computed again.

Where twice a rough estimate fits, no question is left. Otherwise the largest micro-batches that
the data makes are probed (train/probe.py): as many tokens as wanted, fewer if they do not fit,
blocks computed again if not even the longest row would fit without.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxlora.config import TrainConfig
from mlxlora.data.batches import Size, permutation
from mlxlora.data.layout import Layout, choose_layout
from mlxlora.errors import ConfigError
from mlxlora.machine import compiles, token_budget
from mlxlora.plan import Held, plan_memory
from mlxlora.train.forward import Forward
from mlxlora.train.optim import make_optimizer
from mlxlora.train.packing import position_limit
from mlxlora.train.probe import Need, Prober, cut, largest
from mlxlora.train.recompute import trained_blocks
from mlxlora.train.thin import Fill

ROUGHLY = 2.0  # times a rough estimate is more than what is needed
UPDATES_LOOKED_AT = 200
UPDATES_AVERAGED = 50
ROUNDED = 64  # a budget of tokens that had to be found is a multiple of this


@dataclass(frozen=True)
class Cut:
    """How updates are cut. need: of the largest micro-batch, None if it was not probed."""

    tokens: int  # per micro-batch at most, unless one row is longer
    checkpoint_blocks: bool
    layout: Layout
    need: Need | None


class Fitter:
    """Chooses cuts for rows of these sizes that keep a model in a budget of bytes.

    longest: the longest row that can occur, predictions. fill: see Prober. words: logits of a
    token, if forward is of a model with fewer. first: see held_by.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        train: TrainConfig,
        sizes: Sequence[Size],
        longest: int,
        *,
        fill: Fill | None = None,
        words: int = 0,
        first: bool = False,
    ) -> None:
        if train.packing is True and not forward.packs:
            raise ConfigError(
                "train.packing = true: rows of this model cannot be packed; use 'auto'"
            )
        self.model, self.forward, self.train = model, forward, train
        self.sizes, self.longest = sizes, longest
        # The longest row that was seen: a longer one, should it come, stands alone.
        self.longest_seen = max(length for length, _ in sizes)
        self.packed = forward.packs and train.packing is not False
        self.held = held_by(model, train, first=first)
        self._limit = position_limit(model) if self.packed else None
        self._words = words or forward.vocabulary
        self._prober = Prober(model, forward, train, fill)
        self._needs: dict[tuple[int, bool], Need] = {}

    def choose(self, budget: int) -> Cut:
        """The fastest cut that fits the budget, or else the one that needs least."""
        wanted, again = self.train.tokens_per_microbatch, self.train.checkpoint_blocks is True
        most = token_budget() if wanted == "auto" else int(wanted)
        least = min(most, self.longest_seen) if wanted == "auto" else most
        if self._surely_fits(most, again, budget):
            return self.cut(most, again)
        if self.train.checkpoint_blocks == "auto":
            again = not self.fits(least, False, budget)
        if least < most and not self.fits(most, again, budget):
            most = self._most_that_fit(least, most, again, budget)
        return self.cut(most, again, probed=True)

    def cut(self, tokens: int, checkpoint_blocks: bool, probed: bool = False) -> Cut:
        need = self.need(tokens, checkpoint_blocks) if probed else None
        return Cut(tokens, checkpoint_blocks, self.layout(tokens), need)

    def layout(self, tokens: int) -> Layout:
        return choose_layout(
            self.sizes,
            self.longest,
            self.train.batch_size,
            min(tokens, self._limit or tokens),
            packed=self.packed,
            exact=not compiles(),
        )

    def need(self, tokens: int, checkpoint_blocks: bool) -> Need:
        """What the largest micro-batches of so many tokens need, probed once."""
        key = tokens, checkpoint_blocks
        if key not in self._needs:
            layout = self.layout(tokens)
            rows = largest_update(self.sizes, self.train, layout)
            try:
                self._needs[key] = self._prober(rows, layout, checkpoint_blocks)
            except Exception:  # whatever an architecture raises with few of its blocks
                size = largest(cut(rows, layout)).inputs.size
                self._needs[key] = self._guess(size, checkpoint_blocks)
        return self._needs[key]

    def _guess(self, tokens: int, checkpoint_blocks: bool) -> Need:
        """What can be said of a model that does not work with few of its blocks."""
        logits = self._words if self.forward.head is None else 0
        rough = plan_memory(self.model, trained_blocks(self.model), logits)
        activations = rough.peak(tokens, checkpoint_blocks) - rough.peak(0, checkpoint_blocks)
        return Need(tokens, activations, rough.working, 0, math.nan, 0.0)

    def tokens_per_update(self, tokens: int) -> float:
        """Places in the micro-batches of an update, padding included: the mean of the first few."""
        layout = self.layout(tokens)
        updates = islice(updates_of(self.sizes, self.train), UPDATES_AVERAGED)
        return float(np.mean([sum(b.inputs.size for b in cut(rows, layout)) for rows in updates]))

    def peak(self, tokens: int, checkpoint_blocks: bool) -> int:
        return self.held.bytes + self.need(tokens, checkpoint_blocks).bytes

    def fits(self, tokens: int, checkpoint_blocks: bool, budget: int) -> bool:
        return self.peak(tokens, checkpoint_blocks) <= budget

    def bound(self, cut: Cut) -> int:
        """Bytes that a run cut this way needs at most: the probed peak, or a rough one."""
        if cut.need is not None:
            return self.held.bytes + cut.need.bytes
        return self._more_than_needed(cut.tokens, cut.checkpoint_blocks)

    def _surely_fits(self, tokens: int, checkpoint_blocks: bool, budget: int) -> bool:
        return self._more_than_needed(tokens, checkpoint_blocks) <= budget

    def _more_than_needed(self, tokens: int, checkpoint_blocks: bool) -> int:
        logits = self._words if self.forward.head is None else 0
        return more_than_needed(self.model, max(tokens, self.longest), checkpoint_blocks, logits)

    def _most_that_fit(self, least: int, most: int, again: bool, budget: int) -> int:
        """Tokens between these, by the line through what both need."""
        few, many = self.need(least, again), self.need(most, again)
        if many.tokens <= few.tokens or self.held.bytes + few.bytes >= budget:
            return least
        each = (many.bytes - few.bytes) / (many.tokens - few.tokens)
        room = (budget - self.held.bytes - few.bytes) / max(each, 1e-9)
        return int(min(most, max(least, (few.tokens + room) // ROUNDED * ROUNDED)))


def largest_update(sizes: Sequence[Size], train: TrainConfig, layout: Layout) -> list[Size]:
    """The rows of the update with the largest micro-batch, of the first some hundred updates."""

    def of_its_largest(rows: list[Size]) -> tuple[int, int]:
        batch = largest(cut(rows, layout))
        return batch.inputs.size, len(batch.positions)

    return max(islice(updates_of(sizes, train), UPDATES_LOOKED_AT), key=of_its_largest)


def updates_of(sizes: Sequence[Size], train: TrainConfig) -> Iterator[list[Size]]:
    """The rows of each update of a run, in the run's own order if sizes are those of all rows."""
    count, each = len(sizes), train.batch_size
    epochs = range(max(1, math.ceil(train.epochs))) if not train.updates else itertools.count()
    rows = (permutation(count, train.seed, epoch) for epoch in epochs)
    updates = (order[start : start + each] for order in rows for start in range(0, count, each))
    for update in islice(updates, train.updates or None):
        yield [sizes[n] for n in update]


def more_than_needed(
    model: nn.Module, tokens: int, checkpoint_blocks: bool, logits: int = 0
) -> int:
    """Bytes beyond what micro-batches of so many tokens need, found by counting alone.

    logits: how many a token has, if they are computed whole.
    """
    rough = plan_memory(model, trained_blocks(model), logits)
    return int(ROUGHLY * rough.peak(tokens, checkpoint_blocks))


def held_by(model: nn.Module, train: TrainConfig, *, first: bool = False) -> Held:
    """Bytes that are held from the first update to the last.

    first: the first weights are kept until they are validated.
    """
    trained = _bytes(model.trainable_parameters())
    optimizer = make_optimizer(train)
    optimizer.init(model.trainable_parameters())
    replaced = getattr(model, "_mlxlora_replaced", None)
    if replaced is None:
        base = _bytes(model.parameters()) - trained
        base += sum(m._kept.nbytes for m in model.modules() if "_kept" in m)
    else:
        base = sum(array.nbytes for array in replaced.weights.values())
    # The weights, zeros that gradients are summed into, and the weights before the last update.
    copies = 2 + (replaced is None) + first
    return Held(base, copies * trained + _bytes(optimizer.state))


def _bytes(tree: Any) -> int:
    return sum(a.nbytes for _, a in tree_flatten(tree) if isinstance(a, mx.array))
