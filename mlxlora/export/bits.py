"""How many bits each layer gets, where all of them together may take so many bytes.

Every layer starts at its smallest choice. Then, again and again, the step is taken that removes
the most error per byte: along each layer's lower convex hull of (bytes, error) these come in the
right order (Fox 1966, "Discrete optimization via marginal analysis"). It knows nothing of models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Option(Generic[Choice]):
    """What one choice for one layer costs: bytes on disk, and error in any additive unit."""

    choice: Choice
    bytes: int
    error: float


def allotted(options: Mapping[str, list[Option[Choice]]], budget: int) -> dict[str, Option[Choice]]:
    """For every layer one of its options, together of at most budget bytes.

    If even the smallest are more than that, the smallest.
    """
    hulls = {path: _hull(those) for path, those in options.items()}
    taken = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].bytes for hull in hulls.values())
    steps = [
        (_gain(hull[i], hull[i + 1]), path, i + 1)
        for path, hull in hulls.items()
        for i in range(len(hull) - 1)
    ]
    stuck: set[str] = set()
    for _, path, step in sorted(steps, key=lambda one: -one[0]):
        more = hulls[path][step].bytes - hulls[path][step - 1].bytes
        if path in stuck or more > left:
            stuck.add(path)  # its next step does not fit, so none beyond it
            continue
        taken[path], left = step, left - more
    return {path: hulls[path][step] for path, step in taken.items()}


def _hull(options: list[Option[Choice]]) -> list[Option[Choice]]:
    """Options by rising bytes, each step gaining less per byte than the one before."""
    hull: list[Option[Choice]] = []
    for one in sorted(options, key=lambda option: (option.bytes, option.error)):
        if hull and one.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], one):
            hull.pop()
        hull.append(one)
    return hull


def _gain(before: Option[Choice], after: Option[Choice]) -> float:
    """Error that goes for every byte that comes."""
    return (before.error - after.error) / max(after.bytes - before.bytes, 1)
