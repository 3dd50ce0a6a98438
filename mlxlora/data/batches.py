"""Examples -> batches: which rows when (order, Cursor), and in which few shapes.

Order is a function of (seed, epoch): a permutation of all rows, so shuffling is global and
every row appears exactly once an epoch, the remainder included. One optimizer update takes
batch_size rows, drops those that train nothing, sorts the rest by length and cuts them into
micro-batches. MLX keeps a compiled trace for every shape it has seen, so shapes come from
a set of at most MAX_SHAPES, chosen for the data's own lengths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlxlora.data.records import Rows
from mlxlora.data.render import Example, Renderer
from mlxlora.errors import DataError

Shape = tuple[int, int]  # (rows, tokens per row) of a micro-batch
MAX_SHAPES = 12
HALVINGS = ((0,), (0, 1), (0, 2), (0, 3), (1,), (2,), (3,), (0, 1, 2), (0, 2, 3), (0, 1, 2, 3))
MICROBATCH_COST = 32  # what starting one costs, in tokens
LENGTH_STEP = 32  # lengths are rounded up to a multiple of this
SAMPLE_ROWS = 1000  # rows rendered before training, to see lengths and find faults


@dataclass(frozen=True)
class Cursor:
    """Exactly where a run stands in its data."""

    epoch: int = 0
    position: int = 0  # rows of this epoch already taken


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Padding and missing rows have mask False and are never trained."""

    inputs: np.ndarray  # (B, T) int32
    targets: np.ndarray  # (B, T) int32, inputs one token later
    mask: np.ndarray  # (B, T) bool, the target is trained

    @property
    def shape(self) -> Shape:
        return self.inputs.shape[0], self.inputs.shape[1]

    @property
    def tokens(self) -> int:
        """Supervised tokens."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Update:
    """The micro-batches of one optimizer update."""

    batches: tuple[Batch, ...]
    rows: tuple[int, ...]  # 0-based rows in the file, dropped ones not included
    cursor: Cursor  # after this update

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)


@dataclass
class Tally:
    """What happened to rows on their way, counted over the first epoch."""

    rows: int = 0
    dropped: int = 0  # nothing to train, mostly because the answer was cut off
    truncated: int = 0
    refused: int = 0  # the template refused them, with data.on_bad_row = "skip"

    def count(self, example: Example | None) -> None:
        self.rows += 1
        self.refused += example is None
        if example is not None:
            self.truncated += example.truncated
            self.dropped += example.supervised == 0


@dataclass
class Feed:
    """Turns rows into updates. .tally counts what was dropped or cut."""

    rows: Rows
    renderer: Renderer
    batch_size: int
    shapes: tuple[Shape, ...]
    seed: int
    skip_refused: bool = False
    tally: Tally = field(default_factory=Tally)

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def updates(self, cursor: Cursor) -> Iterator[Update]:
        """Updates from this cursor on, without end."""
        while True:
            order = permutation(len(self.rows), self.seed, cursor.epoch)
            for start in range(cursor.position, len(order), self.batch_size):
                taken = order[start : start + self.batch_size]
                end = start + len(taken)
                after = Cursor(cursor.epoch, end)
                if end == len(order):
                    after = Cursor(cursor.epoch + 1, 0)
                examples = self._examples(taken, count=cursor.epoch == 0)
                batches = tuple(cut(examples, self.shapes))
                yield Update(batches, tuple(example.row for example in examples), after)
            cursor = Cursor(cursor.epoch + 1, 0)

    def _examples(self, numbers: np.ndarray, count: bool) -> list[Example]:
        kept = []
        for number in numbers:
            example = render_row(self.rows, int(number), self.renderer, self.skip_refused)
            if count:
                self.tally.count(example)
            if example is not None and example.supervised:
                kept.append(example)
        return kept


def render_row(rows: Rows, number: int, renderer: Renderer, skip_refused: bool) -> Example | None:
    """The example of a row; None if refused and that is to be skipped.

    Raises DataError with file:line.
    """
    record = rows[number]
    try:
        return renderer(record)
    except DataError as error:
        if skip_refused:
            return None
        raise DataError(f"{rows.where(record)}: {error}") from error


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of rows in an epoch, (count,) int64; depends on nothing else."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def sample_lengths(rows: Rows, renderer: Renderer, skip_refused: bool) -> tuple[list[int], bool]:
    """Predictions per row (tokens - 1) of evenly spread rows, and whether these are all.

    Also the place where a template that cannot be masked is found before training. Raises
    DataError if no sampled row trains anything.
    """
    complete = len(rows) <= SAMPLE_ROWS
    numbers = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_ROWS)).astype(int)
    lengths, nothing = [], 0
    for number in numbers:
        example = render_row(rows, int(number), renderer, skip_refused)
        if example is not None and example.supervised:
            lengths.append(len(example.tokens) - 1)
        else:
            nothing += 1
    if not lengths:
        raise DataError(
            f"none of the {nothing} rows looked at in {rows.file.path} has a token to train: "
            f"every answer lies beyond data.max_length = {renderer.max_length} or is empty"
        )
    return lengths, complete


def choose_shapes(
    lengths: Sequence[int], longest: int, batch_size: int, token_budget: int
) -> tuple[Shape, ...]:
    """At most MAX_SHAPES shapes that waste little padding on rows of these lengths.

    longest: the longest row that can occur. Several splits of the budget between lengths
    and row counts are tried on simulated updates; the cheapest wins.
    """
    candidates = []
    for halvings in HALVINGS:
        ladder = _ladder(lengths, longest, MAX_SHAPES // len(halvings))
        shapes = {
            (max(1, min(batch_size, token_budget // length) >> halving), length)
            for length in ladder
            for halving in halvings
        }
        candidates.append(tuple(sorted(shapes, key=lambda s: (s[1], s[0]))))
    random = np.random.default_rng(0)
    trials = [np.sort(random.choice(lengths, batch_size)) for _ in range(32)]
    return min(candidates, key=lambda shapes: sum(_plan(t, shapes)[0] for t in trials))


def cut(examples: Sequence[Example], shapes: Sequence[Shape]) -> Iterator[Batch]:
    """Cut the examples of an update into micro-batches of these shapes, least padding first."""
    if not examples:
        return
    in_order = sorted(examples, key=lambda example: len(example.tokens))
    _, groups = _plan([len(example.tokens) - 1 for example in in_order], shapes)
    for shape, start, end in groups:
        yield collate(in_order[start:end], shape)


def collate(examples: Sequence[Example], shape: Shape) -> Batch:
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    for row, example in enumerate(examples):
        length = len(example.tokens) - 1
        inputs[row, :length] = example.tokens[:-1]
        targets[row, :length] = example.tokens[1:]
        mask[row, :length] = example.mask[1:]
    return Batch(inputs, targets, mask)


def _plan(
    lengths: Sequence[int] | np.ndarray, shapes: Sequence[Shape]
) -> tuple[int, list[tuple[Shape, int, int]]]:
    """The cheapest cut of ascending lengths into shapes: (cost, [(shape, start, end)]).

    The cost is in tokens, padding included. Dynamic programming over prefixes; a group
    takes as many rows as its shape holds, since serving fewer in all never costs more.
    """
    best: list[tuple[int, int, Shape]] = [(0, 0, (0, 0))]
    for end in range(1, len(lengths) + 1):
        options = [
            (
                best[max(0, end - rows)][0] + rows * length + MICROBATCH_COST,
                max(0, end - rows),
                (rows, length),
            )
            for rows, length in shapes
            if lengths[end - 1] <= length
        ]
        best.append(min(options))
    groups, end = [], len(lengths)
    while end > 0:
        _, start, shape = best[end]
        groups.append((shape, start, end))
        end = start
    return best[-1][0], groups[::-1]


def _ladder(lengths: Sequence[int], longest: int, steps: int) -> list[int]:
    """At most so many lengths, the last at least longest, with the least padding in all."""
    rounded = [-(-n // LENGTH_STEP) * LENGTH_STEP for n in [*lengths, longest]]
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
