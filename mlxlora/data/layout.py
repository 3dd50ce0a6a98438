"""How the examples of an update become micro-batches: packed or padded, exact or in few shapes.

An update takes batch_size examples; how they are cut is the machine's business and changes
nothing but speed and memory. Examples are sorted by length. Packed, rows stand one after
another in one long row; padded, rows of like length share a batch. Exact micro-batches have
just the size of their rows; where steps are compiled, every shape costs a trace that is never
freed, so sizes are rounded up to one of at most MAX_SHAPES, chosen for the data's own lengths.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mlxlora.data.batches import Batch, Shape, Size, pack, pad
from mlxlora.data.render import Example

MAX_SHAPES = 12
HALVINGS = ((0,), (0, 1), (0, 2), (0, 3), (1,), (2,), (3,), (0, 1, 2), (0, 2, 3), (0, 1, 2, 3))
MICROBATCH_COST = 32  # what starting one costs, in tokens
LENGTH_STEP = 32  # lengths are rounded up to a multiple of this
TRIALS = 64  # simulated updates that shapes are chosen by
USUAL = 0.95  # quantile of the supervised share that the smaller of two slot counts holds

Group = tuple[int, int]  # examples start..end of the sorted update
Rectangle = tuple[int, int]  # rows, tokens per row
_Option = tuple[int, int, Rectangle]  # tokens, padding included; start; rectangle


@dataclass(frozen=True)
class Layout:
    """A way to cut. shapes () means exact sizes."""

    tokens: int  # per micro-batch at most, unless one row is longer
    packed: bool
    shapes: tuple[Shape, ...] = ()
    longest: int = 0  # of all rows, in predictions; packed shapes look no further back

    def cut(self, examples: Iterable[Example]) -> list[Batch]:
        """The micro-batches of these examples; those without a supervised token are left out."""
        rows = sorted((e for e in examples if e.supervised), key=lambda e: len(e.tokens))
        lengths = [e.size[0] for e in rows]
        if self.packed:
            return [self._packed(rows[start:end]) for start, end in _bins(lengths, self.tokens)]
        if not self.shapes:
            groups = _exact_groups(lengths, self.tokens)
            return [pad(rows[start:end]) for start, end in groups]
        plan = _shaped_groups(lengths, _rectangles(self.shapes))
        return [self._padded(rows[start:end], rectangle) for start, end, rectangle in plan]

    def _packed(self, rows: Sequence[Example]) -> Batch:
        if not self.shapes:
            return pack(rows)
        total, supervised = (sum(column) for column in zip(*(e.size for e in rows), strict=True))
        return pack(rows, _smallest(self.shapes, 1, total, supervised), self.longest)

    def _padded(self, rows: Sequence[Example], rectangle: Rectangle) -> Batch:
        supervised = sum(e.size[1] for e in rows)
        of_this = [shape for shape in self.shapes if shape[:2] == rectangle]
        return pad(rows, _smallest(of_this, *rectangle, supervised))


def choose_layout(
    sizes: Sequence[Size],
    longest: int,
    batch_size: int,
    tokens: int,
    *,
    packed: bool,
    exact: bool,
) -> Layout:
    """The layout for rows of these sizes. longest: the longest row that can occur, predictions.

    Shapes are chosen by simulated updates: the split of the budget between lengths and row
    counts that wastes least wins; most also come with fewer slots for supervised tokens.
    """
    if exact:
        return Layout(tokens, packed)
    shares = np.array([supervised / length for length, supervised in sizes])
    share = float(np.quantile(shares, USUAL))
    steps = MAX_SHAPES if share > 0.9 else MAX_SHAPES // 2
    random = np.random.default_rng(0)
    lengths = [length for length, _ in sizes]
    trials = [np.sort(random.choice(lengths, batch_size)) for _ in range(TRIALS)]
    if packed:
        rectangles = _packed_rectangles(trials, max(longest, tokens), tokens, steps)
    else:
        rectangles = _padded_rectangles(lengths, longest, batch_size, tokens, trials, steps)
    shapes = {(rows, length, rows * length) for rows, length in rectangles}
    if steps < MAX_SHAPES:
        shapes |= {(r, n, _rounded(share * r * n)) for r, n in rectangles if r * n > LENGTH_STEP}
    return Layout(tokens, packed, tuple(sorted(shapes, key=lambda s: (s[1], s))), longest)


def _smallest(shapes: Iterable[Shape], rows: int, length: int, supervised: int) -> Shape:
    fitting = (s for s in shapes if s[0] >= rows and s[1] >= length and s[2] >= supervised)
    return min(fitting, key=lambda s: (s[0] * s[1], s[2]))


def _bins(lengths: Sequence[int], capacity: int) -> list[Group]:
    """Runs of ascending lengths, as few as fit the capacity, the fullest as small as can be."""
    fewest = len(_filled(lengths, capacity))
    low, high = min(capacity, max(lengths, default=0)), capacity
    while low < high:
        middle = (low + high) // 2
        if len(_filled(lengths, middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return _filled(lengths, high)


def _filled(lengths: Sequence[int], capacity: int) -> list[Group]:
    """Runs that each take what fits; a row longer than the capacity stands alone."""
    groups, start, total = [], 0, 0
    for number, length in enumerate(lengths):
        if total + length > capacity and number > start:
            groups.append((start, number))
            start, total = number, 0
        total += length
    return [*groups, (start, len(lengths))] if lengths else []


def _exact_groups(lengths: Sequence[int], tokens: int) -> list[Group]:
    """Groups of ascending lengths with the least padding, none beyond the budget."""

    def options(end: int) -> Iterable[_Option]:
        longest = lengths[end - 1]
        for start in range(end - 1, max(-1, end - 1 - max(1, tokens // longest)), -1):
            yield (end - start) * longest, start, (end - start, longest)

    return [(start, end) for start, end, _ in _cheapest(len(lengths), options)]


def _shaped_groups(
    lengths: Sequence[int] | np.ndarray, rectangles: Sequence[Rectangle]
) -> list[tuple[int, int, Rectangle]]:
    """Groups of ascending lengths and the rectangle that holds each, with least padding.

    A group takes as many rows as its rectangle holds: fewer in all never cost more.
    """

    def options(end: int) -> Iterable[_Option]:
        for rows, length in rectangles:
            if lengths[end - 1] <= length:
                yield rows * length, max(0, end - rows), (rows, length)

    return _cheapest(len(lengths), options)


def _cheapest(
    count: int, options: Callable[[int], Iterable["_Option"]]
) -> list[tuple[int, int, Rectangle]]:
    """The cheapest chain of groups over count rows: [(start, end, rectangle)].

    options(end) gives each group that can end there. Dynamic programming over prefixes.
    """
    best: list[_Option] = [(0, 0, (0, 0))]  # (cost of all so far, last group's start, rectangle)
    for end in range(1, count + 1):
        best.append(
            min(
                (best[start][0] + cost + MICROBATCH_COST, start, r)
                for cost, start, r in options(end)
            )
        )
    chain, end = [], count
    while end > 0:
        _, start, rectangle = best[end]
        chain.append((start, end, rectangle))
        end = start
    return chain[::-1]


def _packed_rectangles(
    trials: Sequence[np.ndarray], most: int, tokens: int, steps: int
) -> list[Rectangle]:
    totals = [int(sum(t[a:b])) for t in trials for a, b in _bins(t.tolist(), tokens)]
    return [(1, length) for length in _ladder(totals, most, steps)]


def _padded_rectangles(
    lengths: Sequence[int],
    longest: int,
    batch_size: int,
    tokens: int,
    trials: Sequence[np.ndarray],
    steps: int,
) -> list[Rectangle]:
    candidates = []
    for halvings in HALVINGS:
        if len(halvings) <= steps:
            ladder = _ladder(lengths, longest, steps // len(halvings))
            candidates.append(
                sorted(
                    {
                        (max(1, min(batch_size, tokens // length) >> halving), length)
                        for length in ladder
                        for halving in halvings
                    }
                )
            )

    def cost(rectangles: list[Rectangle]) -> int:
        plans = (_shaped_groups(trial, rectangles) for trial in trials)
        return sum(rows * n + MICROBATCH_COST for plan in plans for _, _, (rows, n) in plan)

    return min(candidates, key=cost)


def _rectangles(shapes: Sequence[Shape]) -> list[Rectangle]:
    return sorted({shape[:2] for shape in shapes})


def _rounded(count: float) -> int:
    return -(-int(np.ceil(count)) // LENGTH_STEP) * LENGTH_STEP


def _ladder(lengths: Sequence[int], longest: int, steps: int) -> list[int]:
    """At most so many lengths, the last at least longest, with the least padding in all."""
    rounded = [_rounded(n) for n in [*lengths, longest]]
    values, counts = np.unique(rounded, return_counts=True)
    counts[-1] -= 1  # longest itself need not occur
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: padded tokens of the lengths below values[j], the ladder's last step being j - 1
    cost, came = {0: 0.0}, [dict[int, int]()]
    for _ in range(min(steps, len(values))):
        following, origin = dict[int, float](), dict[int, int]()
        for start, spent in cost.items():
            for end in range(start + 1, len(values) + 1):
                total = spent + float(values[end - 1] * (below[end] - below[start]))
                if total < following.get(end, float("inf")):
                    following[end], origin[end] = total, start
        cost = following
        came.append(origin)
    end, ladder = len(values), []
    for origin in reversed(came[1:]):
        if end == 0:
            break
        ladder.append(int(values[end - 1]))
        end = origin[end]
    return ladder[::-1]
