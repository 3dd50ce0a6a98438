"""How long the rows are in tokens, what max_length cuts off, and which rows train nothing.

Rows are rendered as training does it, but whole: what is cut is counted here. That takes longest
of all, so of more than SAMPLE rows an even sample is taken, unless every row is wanted.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mlxlora.config import DataConfig
from mlxlora.data.formats import Record
from mlxlora.data.inspect.scan import FaultCounter, Faults, Progress, Table
from mlxlora.data.render import Example, Renderer
from mlxlora.errors import DataError

SAMPLE = 20_000  # rows
QUANTILES = (0.5, 0.9, 0.99)
BARS = 10  # of the histogram, up to the last quantile; one more for what is longer
WHOLE = 1 << 40  # a max_length that cuts nothing
TOLD_EVERY = 100  # rows


@dataclass(frozen=True)
class Bar:
    """Rows of length first..last, both included [predictions]."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class Lengths:
    """Of the rows that were rendered. A row's length is what it predicts: its tokens but one."""

    rows: int  # rendered
    of: int  # rows that could have been
    max_length: int
    tokens: int  # of all rendered rows, whole
    supervised: int  # of them, trained if nothing were cut
    longest: int
    quantiles: tuple[tuple[float, int], ...]  # (share of rows, that are at most so long)
    bars: tuple[Bar, ...]
    cut_rows: int
    cut_tokens: int
    cut_supervised: int
    nothing: Faults  # rows that train nothing
    refused: Faults  # rows that cannot be rendered or masked
    spelled: Faults  # conversations in which someone writes a special token

    @property
    def complete(self) -> bool:
        return self.rows == self.of

    @property
    def keeps_most(self) -> int:
        """The max_length at which 99 rows in 100 are whole."""
        return dict(self.quantiles)[0.99]


@dataclass(frozen=True)
class Measured:
    """Lengths, and which rows of the table they leave out."""

    lengths: Lengths
    nothing: np.ndarray  # (k,) rows that train nothing
    refused: np.ndarray  # (k,) rows
    notes: tuple[str, ...]  # of the renderer, about the template


def measure(
    table: Table,
    usable: np.ndarray,
    data: DataConfig,
    tokenizer: Any,
    every: bool,
    progress: Progress,
) -> Measured:
    """Render the usable rows (n,) bool: all of them, or an even sample of SAMPLE."""
    rows = np.flatnonzero(usable)
    chosen = rows if every else rows[_spread(len(rows), SAMPLE)]
    renderer = Renderer(tokenizer, replace(data, max_length=WHOLE))
    nothing, refused, spelled = FaultCounter(), FaultCounter(), FaultCounter()
    spelling = _special_words(tokenizer)
    marked: dict[str, list[int]] = {"nothing": [], "refused": []}
    sizes = np.zeros((len(chosen), 3), np.int64)  # length, supervised, supervised when cut
    count = 0
    for place, row in enumerate(chosen.tolist()):
        if place % TOLD_EVERY == 0:
            progress("counting tokens", place, len(chosen))
        where = partial(table.where, row)
        record = table.record(row)
        if word := _spelled(spelling, record):
            spelled.add(where, f"a message spells out {word}")
        try:
            example = renderer(record)
        except DataError as error:
            refused.add(where, str(error))
            marked["refused"].append(row)
            continue
        kept = int(example.mask[1 : data.max_length + 1].sum())
        sizes[count] = (len(example.tokens) - 1, example.supervised, kept)
        count += 1
        if not kept:
            nothing.add(where, _why_nothing(example))
            marked["nothing"].append(row)
    faults = (counter.faults for counter in (nothing, refused, spelled))
    lengths = _summed(sizes[:count], len(rows), data.max_length, *faults)
    return Measured(
        lengths,
        np.array(marked["nothing"], np.int64),
        np.array(marked["refused"], np.int64),
        tuple(renderer.notes),
    )


def _spread(count: int, most: int) -> np.ndarray:
    """At most so many of the places 0..count-1, evenly spread."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def spread_rows(rows: np.ndarray, most: int) -> list[int]:
    """At most so many of the rows, evenly spread, always the same."""
    return list(rows[_spread(len(rows), most)].tolist()) if most else []


def _special_words(tokenizer: Any) -> re.Pattern[str] | None:
    words = [word for word in map(str, tokenizer.all_special_tokens) if len(word) > 2]
    return re.compile("|".join(map(re.escape, words))) if words else None


def _spelled(spelling: re.Pattern[str] | None, record: Record) -> str:
    """A special token that stands in a message as text: to the model it is that token."""
    hits = (spelling.search(m["content"]) for m in record.messages) if spelling else iter(())
    return next((hit.group() for hit in hits if hit), "")


def _why_nothing(example: Example) -> str:
    if example.supervised:
        return "all that would be trained lies beyond data.max_length"
    return "there is nothing to train: its answer or text is empty"


def _summed(
    sizes: np.ndarray,
    of: int,
    max_length: int,
    nothing: Faults,
    refused: Faults,
    spelled: Faults,
) -> Lengths:
    lengths, supervised, kept = sizes.T
    cut = np.maximum(lengths - max_length, 0)
    some = lengths if len(lengths) else np.zeros(1, np.int64)
    at = np.quantile(some, QUANTILES, method="inverted_cdf").astype(int).tolist()
    return Lengths(
        rows=len(sizes) + refused.count,
        of=of,
        max_length=max_length,
        tokens=int(lengths.sum()),
        supervised=int(supervised.sum()),
        longest=int(some.max()),
        quantiles=tuple(zip(QUANTILES, at, strict=True)),
        bars=_bars(lengths, at[-1]),
        cut_rows=int((cut > 0).sum()),
        cut_tokens=int(cut.sum()),
        cut_supervised=int((supervised - kept).sum()),
        nothing=nothing,
        refused=refused,
        spelled=spelled,
    )


def _bars(lengths: np.ndarray, usual: int) -> tuple[Bar, ...]:
    """Equal steps of a round number up to the usual lengths, and one bar for the longer ones."""
    if not len(lengths):
        return ()
    step = next(s for s in _round_numbers() if (usual + 1) / s <= BARS)
    edges = list(range(0, usual + step, step))
    edges[-1] = max(edges[-1], usual + 1)
    longest = int(lengths.max())
    counts, _ = np.histogram(lengths, [*edges, max(longest, edges[-1]) + 1])
    lasts = [edge - 1 for edge in edges[1:]] + [max(longest, edges[-1])]
    bars = [Bar(first, last, int(n)) for first, last, n in zip(edges, lasts, counts, strict=True)]
    full = [number for number, bar in enumerate(bars) if bar.rows]
    return tuple(bars[full[0] : full[-1] + 1])


def _round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
