"""Examples -> batches: which rows when (order, Cursor), and the arrays of a micro-batch.

Order is a function of (seed, epoch): a permutation of all rows, so shuffling is global and
every row appears exactly once an epoch, the remainder included. One optimizer update takes
batch_size rows; layout.py cuts them into micro-batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlxlora.data.records import Rows
from mlxlora.data.render import Example, Renderer
from mlxlora.errors import DataError

Shape = tuple[int, int, int]  # rows, tokens per row and supervised slots of a micro-batch
Size = tuple[int, int]  # of a row: predictions, how many of them are trained
Part = tuple[int, int]  # of a batch: a row in the file, how many of its tokens are trained
SAMPLE_ROWS = 1000  # rows rendered before training, to see lengths and find faults


@dataclass(frozen=True)
class Cursor:
    """Exactly where a run stands in its data."""

    epoch: int = 0
    position: int = 0  # rows of this epoch already taken


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens, and the places in them whose next token is trained.

    Rows are padded at the end; in a packed batch, the one row is several, one after another.
    """

    inputs: np.ndarray  # (B, T) int32
    positions: np.ndarray  # (S,) int32, into the B * T places; 0 in slots that are left over
    targets: np.ndarray  # (S,) int32, the token after each position
    weights: np.ndarray  # (S,) float32, 1; 0 in slots that are left over
    ends: tuple[int, ...]  # where the packed rows end, or (T,)
    segments: np.ndarray | None = None  # (1, T) int32: each place's row, if ends does not tell
    reach: int | None = None  # no packed row is longer
    parts: tuple[Part, ...] = ()  # whose the slots are, in their order

    @property
    def shape(self) -> Shape:
        return self.inputs.shape[0], self.inputs.shape[1], len(self.positions)

    @property
    def tokens(self) -> int:
        """Supervised tokens."""
        return int(self.weights.sum())


@dataclass(frozen=True)
class Update:
    """The micro-batches of one optimizer update."""

    batches: tuple[Batch, ...]
    rows: tuple[int, ...]  # 0-based rows in the file, dropped ones not included
    cursor: Cursor  # after this update
    tally: "Tally"  # of the rows taken for it


@dataclass(frozen=True)
class Tally:
    """What happened to rows on their way, counted."""

    rows: int = 0
    dropped: int = 0  # nothing to train, mostly because the answer was cut off
    truncated: int = 0
    refused: int = 0  # the template refused them, with data.on_bad_row = "skip"

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class Feed:
    """Turns rows into updates."""

    rows: Rows
    renderer: Renderer
    batch_size: int
    cut: Callable[[list[Example]], list[Batch]]  # Layout.cut
    seed: int
    skip_refused: bool = False

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
                yield self._update(taken, after)
            cursor = Cursor(cursor.epoch + 1, 0)

    def _update(self, numbers: np.ndarray, after: Cursor) -> Update:
        examples = [
            render_row(self.rows, int(number), self.renderer, self.skip_refused)
            for number in numbers
        ]
        usable = [e for e in examples if e is not None]
        trained = [e for e in usable if e.supervised]
        tally = Tally(
            rows=len(examples),
            dropped=len(usable) - len(trained),
            truncated=sum(e.truncated for e in usable),
            refused=len(examples) - len(usable),
        )
        return Update(tuple(self.cut(trained)), tuple(e.row for e in trained), after, tally)


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


def sample_sizes(rows: Rows, renderer: Renderer, skip_refused: bool) -> tuple[list[Size], int]:
    """Sizes of evenly spread rows that train something, and the longest that can occur.

    Also the place where a template that cannot be masked is found before training. Raises
    DataError if no sampled row trains anything.
    """
    complete = len(rows) <= SAMPLE_ROWS
    numbers = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_ROWS)).astype(int)
    sizes, nothing = [], 0
    for number in numbers:
        example = render_row(rows, int(number), renderer, skip_refused)
        if example is not None and example.supervised:
            sizes.append(example.size)
        else:
            nothing += 1
    if not sizes:
        raise DataError(
            f"none of the {nothing} rows looked at in {rows.file.path} has a token to train: "
            f"every answer lies beyond data.max_length = {renderer.max_length} or is empty"
        )
    longest = max(length for length, _ in sizes)
    return sizes, longest if complete else renderer.max_length


def pad(examples: Sequence[Example], shape: Shape | None = None) -> Batch:
    """Rows under each other, each padded at its end; in the shape given, or just as large."""
    sizes = [example.size for example in examples]
    rows, length, slots = shape or (
        len(examples),
        max(n for n, _ in sizes),
        sum(supervised for _, supervised in sizes),
    )
    inputs = np.zeros((rows, length), np.int32)
    for row, example in enumerate(examples):
        inputs[row, : len(example.tokens) - 1] = example.tokens[:-1]
    starts = [row * length for row in range(len(examples))]
    supervised = _supervised(examples, starts, slots)
    return Batch(inputs, *supervised, ends=(length,), parts=_parts(examples))


def pack(examples: Sequence[Example], shape: Shape | None = None, reach: int = 0) -> Batch:
    """Rows one after another in one; in the shape given (then with segments), or just as long."""
    ends = np.cumsum([example.size[0] for example in examples])
    starts = [0, *ends[:-1].tolist()]
    slots = shape[2] if shape else sum(example.supervised for example in examples)
    inputs = np.zeros((1, shape[1] if shape else int(ends[-1])), np.int32)
    for start, end, example in zip(starts, ends, examples, strict=True):
        inputs[0, start:end] = example.tokens[:-1]
    supervised = _supervised(examples, starts, slots)
    if shape is None:
        return Batch(inputs, *supervised, ends=tuple(ends.tolist()), parts=_parts(examples))
    # Padding is one more row, which trains nothing.
    segments = np.searchsorted(ends, np.arange(shape[1]), side="right").astype(np.int32)
    return Batch(inputs, *supervised, (shape[1],), segments[None], reach, _parts(examples))


def _parts(examples: Sequence[Example]) -> tuple[Part, ...]:
    return tuple((example.row, example.supervised) for example in examples)


def _supervised(
    examples: Sequence[Example], starts: Sequence[int], slots: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions, targets, weights) of examples that start at these places."""
    positions, targets = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    weights = np.zeros(slots, np.float32)
    places = [np.flatnonzero(example.mask[1:]) for example in examples]
    count = sum(len(place) for place in places)
    positions[:count] = np.concatenate([s + p for s, p in zip(starts, places, strict=True)])
    targets[:count] = np.concatenate(
        [example.tokens[1:][p] for example, p in zip(examples, places, strict=True)]
    )
    weights[:count] = 1
    return positions, targets, weights
