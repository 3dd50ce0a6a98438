"""How a model is best trained on a machine: found out before the first update, then kept.

Packed or padded, how many tokens at once, blocks computed again or not: none of it changes an
update but in rounding and in what dropout draws, so a run that goes on later keeps the ways it
began with.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlxlora.config import TrainConfig
from mlxlora.data.batches import Size
from mlxlora.data.layout import Layout
from mlxlora.errors import CheckpointError
from mlxlora.memory import cache_limit, memory_budget
from mlxlora.products import use_products
from mlxlora.train.fitting import Fitter, largest_update
from mlxlora.train.forward import Forward
from mlxlora.train.probe import cut, largest


@dataclass(frozen=True)
class Ways:
    """The choices, and the forward pass that follows them."""

    layout: Layout
    forward: Forward
    products: str  # of quantized weights, see products.py
    base_bytes: int  # of the weights that are not trained
    peak_bytes: int  # needed at most, as foretold

    def to_dict(self) -> dict[str, Any]:
        """Plain values that restore() reads."""
        return {
            "layout": dataclasses.asdict(self.layout),
            "checkpoint_blocks": self.forward.checkpoint_blocks,
            "products": self.products,
            "base_bytes": self.base_bytes,
            "peak_bytes": self.peak_bytes,
        }

    @classmethod
    def restore(cls, model: nn.Module, value: Mapping[str, Any]) -> "Ways":
        """The ways that a run began with. Raises CheckpointError if they do not work."""
        layout = dict(value["layout"])
        layout["shapes"] = tuple(tuple(shape) for shape in layout["shapes"])
        use_products(model, value["products"])
        sizes = value["base_bytes"], value["peak_bytes"]
        ways = cls(Layout(**layout), Forward(model), value["products"], *sizes)
        ways.forward.checkpoint_blocks = value["checkpoint_blocks"]
        if ways.layout.packed and not ways.forward.packs:
            raise CheckpointError(
                "the run began with packed rows, which this model cannot work on as it is loaded "
                "here; go on with the versions of mlx and mlx-lm that the run began with"
            )
        return ways


def choose_ways(
    model: nn.Module, train: TrainConfig, sizes: list[Size], longest: int, products: str
) -> Ways:
    """The ways for rows of these sizes: how updates are cut, and whether blocks are checkpointed,
    by what fits this machine. Raises ConfigError if rows are to be packed and cannot be.
    """
    forward = Forward(model)
    fitter = Fitter(model, forward, train, sizes, longest)
    budget = memory_budget()
    cut = fitter.choose(budget - cache_limit(budget))
    forward.checkpoint_blocks = cut.checkpoint_blocks
    return Ways(cut.layout, forward, products, fitter.held.base, fitter.bound(cut))


def smaller_ways(
    model: nn.Module,
    train: TrainConfig,
    sizes: list[Size],
    longest: int,
    value: Mapping[str, Any],
) -> Ways:
    """The ways of value (see to_dict) with micro-batches of half as many tokens as they have now.

    Where a single row is more, its blocks are computed again, unless that was forbidden.
    """
    now = Ways.restore(model, value)
    rows = largest_update(sizes, train, now.layout)
    tokens = max(1, min(now.layout.tokens, largest(cut(rows, now.layout)).inputs.size) // 2)
    again = now.forward.checkpoint_blocks or tokens < longest
    wanted = dataclasses.replace(
        train,
        tokens_per_microbatch=tokens,
        checkpoint_blocks=again and train.checkpoint_blocks is not False,
    )
    return choose_ways(model, wanted, sizes, longest, now.products)
