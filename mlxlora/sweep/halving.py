"""Successive halving: when variants are compared, and which of them go on.

All variants train for a share of their run; the better part of them goes on to the next rung,
with a share larger by the same factor, until the last finish (Jamieson and Talwalkar 2016,
"Non-stochastic Best Arm Identification and Hyperparameter Optimization", and the inner loop of
Hyperband, Li et al. 2018). A variant goes on from its own checkpoint, on the schedule of its whole
run, so what finishes is what training it alone would have given.
"""

import math
from collections.abc import Mapping

from mlxlora.errors import ConfigError

EARLIEST = 0.1  # share of a run before which nobody is dropped: the first validation, by default
LEAST = 0.01  # share of a run that is worth a comparison when rungs are asked for


def rungs(count: int, keep: float, wished: int | None = None) -> tuple[float, ...]:
    """The shares of a run after which count variants are compared, ascending; the end is none.

    keep is the share of the variants that goes on. By default there are as many rungs as leave
    one variant, but none before EARLIEST. Raises ConfigError for more than make sense.
    """
    if not 0 < keep < 1:
        raise ConfigError(f"--keep must be above 0 and below 1, not {keep:g}")
    if wished is None:
        # a hair more, since the logarithms of 8 and 2 need not divide to 3
        useful = math.floor(math.log(max(count, 1)) / math.log(1 / keep) + 1e-9)
        most = math.floor(math.log(EARLIEST) / math.log(keep) + 1e-9)
        wished = max(min(useful, most), 0)
    elif wished and keep**wished < LEAST:
        raise ConfigError(
            f"--rungs {wished} with --keep {keep:g}: the first would be after "
            f"{100 * keep**wished:.2g} % of a run; ask for fewer"
        )
    return tuple(keep ** (wished - number) for number in range(wished))


def target(share: float, updates: int, every: int) -> int:
    """The update of a rung: the first validation, one every so many updates, at or after it."""
    return min(updates, math.ceil(share * updates / every - 1e-9) * every)


def kept(losses: Mapping[str, float | None], keep: float) -> list[str]:
    """Who goes on, best first: the better share, at least one. None and NaN are worst.

    Of equals, those that come first.
    """
    ranked = sorted(losses, key=lambda name: rank(losses[name]))
    return ranked[: max(1, math.ceil(len(ranked) * keep - 1e-9))]


def rank(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss
