"""Rows that say nearly the same, among millions: MinHash and locality-sensitive hashing.

Two rows are near if the sets of all 8-byte pieces of their texts, lower-cased and with single
spaces, overlap by NEAR: intersection over union (Broder 1997, On the resemblance and containment
of documents). In a text of a hundred words that is about four words changed. Pieces that stand in
more than a fifth of the rows (an instruction that all share) are not compared, nor are system
prompts.

A row's pieces are hashed once, the smallest hash in each of 128 bins is its sketch (Li, Owen and
Zhang 2012, One permutation hashing), empty bins borrow (Shrivastava 2017, Optimal densification).
Rows that agree in one of 16 bands of 8 bins are candidates; each pair of those is compared exactly.
So what is called near is near; of pairs just at NEAR 5 in 100 are missed, at 0.9 1 in 10,000.

The bands lie in temporary files, 64 bytes a row, and are sorted one at a time: in memory are some
30 bytes a row. Only the first TEXT_LIMIT bytes of a row's text are looked at.
"""

import contextlib
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import orjson

from mlxlora.data.formats import Record
from mlxlora.data.inspect.scan import Progress, Table

NEAR = 0.8
PIECE = 8  # bytes
BINS, BANDS = 128, 16
LEAST_PIECES = 10  # a row with fewer is compared as a whole only (exact copies)
TEXT_LIMIT = 1 << 14  # bytes
SHARED = 0.2  # of the rows; pieces in more of them are not compared
SHARED_ROWS = 10  # and at least in so many
SAMPLE = 1000  # rows from which the shared pieces are told
CELLS = 1 << 22  # counted in so many places; two pieces may share one
BLOCK = 1 << 18  # bytes of text sketched together
LEADERS = 4  # a row is compared with at most so many others that agree in a band
MOST_PAIRS = 300_000  # compared exactly; then it is said that there may be more
_SEEDS = np.random.default_rng(1997)
_BORROWS = np.stack([_SEEDS.permutation(BINS) for _ in range(BINS)])  # in which order, each bin
_NONE = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Similar:
    """For each of the rows compared, the first row found that it is near to, or -1."""

    copies: np.ndarray  # (n,) int32 row of train that comes before it
    leaks: np.ndarray  # (n,) int32 row that is held out
    compared: int  # pairs
    complete: bool  # False: there were more than MOST_PAIRS


def find_similar(table: Table, train: np.ndarray, held: np.ndarray, progress: Progress) -> Similar:
    """Compare the rows train (ascending) with one another, and with the rows held out."""
    shared = _shared_pieces(table, train)
    rows = np.concatenate([held, train]).astype(np.int32)
    pairs = _Pairs(table, shared, len(held), rows)
    with _Bands() as bands:
        kept = _sketch(table, rows, shared, bands, progress)
        for band in range(BANDS):
            progress("comparing rows", band, BANDS)
            for bucket in _buckets(bands.read(band)):
                pairs.compare(kept[bucket])
                if pairs.compared >= MOST_PAIRS:
                    return pairs.result(complete=False)
    return pairs.result(complete=True)


def text_of(record: Record) -> bytes:
    """What a row says, as it is compared: no system prompt, no case, single spaces."""
    said = [record.text]
    for message in record.messages:
        if message["role"] != "system":
            said.append(message["content"])
            if calls := message.get("tool_calls"):
                with contextlib.suppress(orjson.JSONEncodeError):  # nested too deeply
                    said.append(orjson.dumps(calls).decode())
    text = " ".join(said)[:TEXT_LIMIT]
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split()).encode("utf-8", "replace")[:TEXT_LIMIT]


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two sets of pieces."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - both
    return both / union if union else 0.0


def pieces_of(text: bytes, shared: np.ndarray) -> np.ndarray:
    """The set of a text's pieces, hashed, without the shared ones."""
    hashes = _mixed(_windows(text))
    return np.unique(hashes[~shared[_cell(hashes)]])


class _Pairs:
    """Compares candidates exactly, each row until it has a partner."""

    def __init__(self, table: Table, shared: np.ndarray, held: int, rows: np.ndarray) -> None:
        self.table, self.shared, self.held, self.rows = table, shared, held, rows
        self.copies = np.full(len(rows) - held, -1, np.int32)
        self.leaks = np.full(len(rows) - held, -1, np.int32)
        self.compared = 0

    def compare(self, bucket: np.ndarray) -> None:
        """Rows (places in rows, ascending) that agree in a band: held out first, then train."""
        held = bucket[bucket < self.held][:LEADERS].tolist()
        leaders: list[int] = []
        known: dict[int, np.ndarray] = {}
        for place in bucket[bucket >= self.held].tolist():
            member = place - self.held
            if self.leaks[member] < 0:
                self.leaks[member] = self._first_near(place, held, known)
            if self.copies[member] < 0:
                found = self._first_near(place, leaders, known)
                self.copies[member] = found
                if found < 0 and len(leaders) < LEADERS:
                    leaders.append(place)
            known = {key: known[key] for key in (*held, *leaders) if key in known}
            if self.compared >= MOST_PAIRS:
                return

    def _first_near(self, place: int, others: Sequence[int], known: dict[int, np.ndarray]) -> int:
        for other in others:
            self.compared += 1
            if similarity(self._pieces(place, known), self._pieces(other, known)) >= NEAR:
                return int(self.rows[other])
        return -1

    def _pieces(self, place: int, known: dict[int, np.ndarray]) -> np.ndarray:
        if place not in known:
            text = text_of(self.table.record(int(self.rows[place])))
            known[place] = pieces_of(text, self.shared)
        return known[place]

    def result(self, complete: bool) -> Similar:
        return Similar(self.copies, self.leaks, self.compared, complete)


class _Bands:
    """A temporary file a band, of a 32-bit key a row."""

    def __enter__(self) -> "_Bands":
        with contextlib.ExitStack() as stack:
            self._files: list[IO[bytes]] = [
                stack.enter_context(tempfile.TemporaryFile()) for _ in range(BANDS)
            ]
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def write(self, keys: np.ndarray) -> None:
        """keys (rows, BANDS) uint32"""
        for file, column in zip(self._files, keys.T, strict=True):
            file.write(column.tobytes())

    def read(self, band: int) -> np.ndarray:
        file = self._files[band]
        file.seek(0)
        return np.fromfile(file, np.uint32)


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The places of equal keys, ascending, where there are at least two."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    equal = np.concatenate([[False], ordered[1:] == ordered[:-1], [False]])
    starts = np.flatnonzero(equal[1:] & ~equal[:-1])
    ends = np.flatnonzero(equal[:-1] & ~equal[1:]) + 1
    del ordered, equal
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield order[start:end]


def _sketch(
    table: Table, rows: np.ndarray, shared: np.ndarray, bands: _Bands, progress: Progress
) -> np.ndarray:
    """Write the keys of rows with enough pieces; returns their places in rows."""
    kept: list[np.ndarray] = []
    for start, texts in _blocks(table, rows):
        progress("sketching rows", start, len(rows))
        keys, enough = _keys(texts, shared)
        bands.write(keys[enough])
        kept.append((start + np.flatnonzero(enough)).astype(np.int32))
    return np.concatenate(kept) if kept else np.zeros(0, np.int32)


def _blocks(table: Table, rows: np.ndarray) -> Iterator[tuple[int, list[bytes]]]:
    """(place of the first in rows, texts), about BLOCK bytes at a time."""
    texts: list[bytes] = []
    size = start = 0
    for place, row in enumerate(rows.tolist()):
        texts.append(text_of(table.record(row)))
        size += len(texts[-1])
        if size >= BLOCK:
            yield start, texts
            texts, size, start = [], 0, place + 1
    if texts:
        yield start, texts


def _keys(texts: Sequence[bytes], shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((rows, BANDS) uint32 keys, (rows,) bool: it has enough pieces to be compared)."""
    lengths = np.array([len(text) for text in texts])
    hashes = _mixed(_windows(b"".join(texts) + bytes(PIECE - 1)))
    owner = np.repeat(np.arange(len(texts), dtype=np.int64), lengths)
    last = np.repeat(np.cumsum(lengths) - PIECE, lengths)
    inside = (np.arange(len(owner)) <= last) & ~shared[_cell(hashes)]
    hashes, owner = hashes[inside], owner[inside]
    sketch = np.full(len(texts) * BINS, _NONE)
    np.minimum.at(sketch, owner * BINS + (hashes >> np.uint64(57)).astype(np.int64), hashes)
    enough = np.bincount(owner, minlength=len(texts)) >= LEAST_PIECES
    by_row = sketch.reshape(-1, BINS)
    by_row[~enough] = 0
    return _band_keys(_densified(by_row)), enough


def _densified(sketch: np.ndarray) -> np.ndarray:
    """Each empty bin filled with that of the first full one in its own order of all bins."""
    full = sketch.copy()
    rows, bins = np.nonzero(sketch == _NONE)
    for attempt in range(BINS):
        if not len(rows):
            break
        borrowed = sketch[rows, _BORROWS[bins, attempt]]
        full[rows, bins] = borrowed
        still = borrowed == _NONE
        rows, bins = rows[still], bins[still]
    return full


def _band_keys(sketch: np.ndarray) -> np.ndarray:
    in_bands = sketch.reshape(len(sketch), BANDS, BINS // BANDS)
    keys = np.zeros((len(sketch), BANDS), np.uint64)
    for number in range(BINS // BANDS):
        keys = _mixed(keys ^ in_bands[:, :, number])
    return (keys >> np.uint64(32)).astype(np.uint32)


def _shared_pieces(table: Table, rows: np.ndarray) -> np.ndarray:
    """(CELLS,) bool: pieces that stand in more than SHARED of a sample of the rows."""
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int)]
    counts = np.zeros(CELLS, np.uint16)
    none = np.zeros(CELLS, bool)
    for row in sample.tolist():
        counts[np.unique(_cell(pieces_of(text_of(table.record(row)), none)))] += 1
    return np.asarray(counts > max(SHARED * len(sample), SHARED_ROWS))


def _windows(text: bytes) -> np.ndarray:
    """(n,) uint64: all pieces of a text, as numbers."""
    count = max(0, len(text) - PIECE + 1)
    return np.ndarray((count,), "<u8", text, 0, (1,)).copy() if count else np.zeros(0, np.uint64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """A permutation of 64-bit numbers that looks random (splitmix64: Steele et al. 2014)."""
    x = numbers + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def _cell(hashes: np.ndarray) -> np.ndarray:
    return np.asarray(hashes >> np.uint64(42)).astype(np.int64)
