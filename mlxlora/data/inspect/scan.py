"""Every line of the data, read once in order: what it holds, where it is, what is wrong with it.

Unlike RowFile, which training uses, nothing stops at a bad line: all are counted, and which format
each row has. Of a line 26 bytes stay in memory; its text does not. What rows say to one another
(copies) and to a model (tokens) is looked at elsewhere, in rows read again from the disk.
"""

import hashlib
import re
import weakref
import zlib
from array import array
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from mlxlora.config import DataConfig
from mlxlora.data.formats import READERS, Record, RowFault, parse, parse_named
from mlxlora.data.records import SPLITS, broken_line, data_files, kept_for_validation, opened
from mlxlora.errors import DataError

Progress = Callable[[str, int, int], None]  # (what, bytes or rows done, of how many)

FORMATS = tuple(READERS)  # a row's format is kept as its place in here
BAD = 255  # the format of a line that is no row
REASONS = 50  # told apart; what comes after is counted together
PLACES = 3  # of a reason, shown
TOLD_EVERY = 4 << 20  # bytes between two reports of progress
_PARTICULAR = re.compile(r"""'[^']*'|"[^"]*"|\d+""")  # what tells two faults of a kind apart


class Source:
    """A file of rows, open for reading lines by their place. Of gzip, the unpacked text is read."""

    def __init__(self, path: Path, split: str, progress: Progress) -> None:
        self.path, self.split = path, split
        packed = path.stat().st_size if path.exists() else 0
        what = f"unpacking {path.name}"
        self._file = opened(path, lambda done: progress(what, done, packed))
        self.bytes = self._file.seek(0, 2)  # of text
        weakref.finalize(self, self._file.close)

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(number from 1, where it starts, the line), without a byte order mark."""
        self._file.seek(0)
        position = len(BOM_UTF8) if self._file.read(3) == BOM_UTF8 else 0
        self._file.seek(position)
        for number, line in enumerate(self._file, 1):
            yield number, position, line
            position += len(line)

    def line(self, offset: int) -> bytes:
        self._file.seek(offset)
        return self._file.readline()


@dataclass(frozen=True)
class Reason:
    """Why some lines or rows cannot be used, as it was said of the first of them."""

    text: str
    count: int
    places: tuple[str, ...]  # file:line of the first PLACES


@dataclass(frozen=True)
class Faults:
    """Lines or rows that cannot be used; the most frequent reasons first."""

    count: int = 0
    reasons: tuple[Reason, ...] = ()


class FaultCounter:
    """Counts faults by reason without keeping them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._places: dict[str, list[str]] = {}

    def add(self, where: Callable[[], str], reason: str) -> None:
        kind = _PARTICULAR.sub("", reason.partition(", near ")[0])
        if kind not in self._first and len(self._first) >= REASONS:
            kind, reason = "", "other reasons"
        self._counts[kind] += 1
        self._first.setdefault(kind, reason)
        places = self._places.setdefault(kind, [])
        if len(places) < PLACES:
            places.append(where())

    @property
    def faults(self) -> Faults:
        reasons = tuple(
            Reason(self._first[kind], count, tuple(self._places[kind]))
            for kind, count in self._counts.most_common()
        )
        return Faults(self._counts.total(), reasons)


@dataclass(frozen=True)
class Table:
    """The lines that are not blank, in the order of the files; n of them."""

    sources: tuple[Source, ...]
    columns: Mapping[str, str]
    offsets: np.ndarray  # (n,) int64: where the line starts in its file
    numbers: np.ndarray  # (n,) uint32: its number there, from 1
    digests: np.ndarray  # (n,) uint64: equal for rows of equal content, however they are written
    formats: np.ndarray  # (n,) uint8: place in FORMATS, or BAD
    files: np.ndarray  # (n,) uint8: place in sources
    splits: np.ndarray  # (n,) uint8: place in SPLITS
    faults: Faults
    kinds: Mapping[str, str]  # of the formats found: chat, completion or text
    automatic: bool  # one file, split by mlxlora

    def __len__(self) -> int:
        return len(self.offsets)

    def line(self, row: int) -> bytes:
        return self.sources[self.files[row]].line(int(self.offsets[row]))

    def record(self, row: int) -> Record:
        record = parse(orjson.loads(self.line(row)), self.columns)
        return Record(row, record.kind, record.messages, record.text, record.tools)

    def where(self, row: int) -> str:
        return f"{self.sources[self.files[row]].path}:{self.numbers[row]}"

    @property
    def counts(self) -> dict[str, int]:
        """Rows by format, the most frequent first."""
        counts = np.bincount(self.formats, minlength=BAD + 1)
        found = [(name, int(counts[i])) for i, name in enumerate(FORMATS) if counts[i]]
        return dict(sorted(found, key=lambda pair: -pair[1]))

    @property
    def kind(self) -> str:
        """The kind of most rows: the one that a cleaned copy would have."""
        by_kind: Counter[str] = Counter()
        for name, count in self.counts.items():
            by_kind[self.kinds[name]] += count
        return by_kind.most_common(1)[0][0] if by_kind else ""

    @property
    def of_kind(self) -> np.ndarray:
        """(n,) bool: rows of that kind."""
        wanted = [i for i, name in enumerate(FORMATS) if self.kinds.get(name) == self.kind]
        return np.isin(self.formats, wanted)


def scan(data: DataConfig, seed: int, progress: Progress) -> Table:
    """Read data.path. Raises DataError if it cannot be read or holds no line at all."""
    named = data_files(data)
    sources = tuple(Source(path, split, progress) for split, path in named.items())
    scanner = _Scanner(sources, data.columns, progress)
    for number, source in enumerate(sources):
        scanner.read(number, source)
    if not scanner.offsets:
        raise DataError(f"{data.path} has no rows (it is empty)")
    return scanner.table(data, seed)


class _Scanner:
    """Holds the columns of the table while they grow."""

    def __init__(
        self, sources: tuple[Source, ...], columns: Mapping[str, str], progress: Progress
    ) -> None:
        self.sources, self.columns, self.progress = sources, columns, progress
        self.offsets, self.numbers, self.digests = array("q"), array("I"), array("Q")
        self.formats, self.files, self.checksums = array("B"), array("B"), array("I")
        self.kinds: dict[str, str] = {}
        self.faults = FaultCounter()
        self._before, self._all = 0, sum(source.bytes for source in sources)

    def read(self, number: int, source: Source) -> None:
        told = 0
        for line_number, position, line in source.lines():
            if position - told >= TOLD_EVERY:
                told = position
                self.progress("reading rows", self._before + position, self._all)
            if line.isspace():
                continue
            digest, place = 0, BAD
            try:
                digest, place = self._row(line)
            except RowFault as fault:
                self.faults.add(lambda at=f"{source.path}:{line_number}": at, str(fault))  # type: ignore[misc]
            self.offsets.append(position)
            self.numbers.append(line_number)
            self.digests.append(digest)
            self.formats.append(place)
            self.files.append(number)
            self.checksums.append(zlib.crc32(line))
        self._before += source.bytes

    def _row(self, line: bytes) -> tuple[int, int]:
        """(digest of what the row says, place of its format). Raises RowFault."""
        try:
            name, record = parse_named(orjson.loads(line), self.columns)
        except orjson.JSONDecodeError as error:
            raise RowFault(broken_line(line, error)) from error
        self.kinds.setdefault(name, record.kind)
        return content_digest(record, line), FORMATS.index(name)

    def table(self, data: DataConfig, seed: int) -> Table:
        files = np.asarray(self.files, np.uint8)
        formats = np.asarray(self.formats, np.uint8)
        automatic = self.sources[0].split == ""
        if automatic:
            splits = np.zeros(len(files), np.uint8)
            usable = np.flatnonzero(formats != BAD)
            hashes = np.asarray(self.checksums, np.uint32)[usable]
            splits[usable] = kept_for_validation(hashes, data.valid_fraction, seed)
        else:
            of_source = [SPLITS.index(source.split) for source in self.sources]
            splits = np.asarray(of_source, np.uint8)[files]
        return Table(
            self.sources,
            self.columns,
            np.asarray(self.offsets, np.int64),
            np.asarray(self.numbers, np.uint32),
            np.asarray(self.digests, np.uint64),
            formats,
            files,
            splits,
            self.faults.faults,
            self.kinds,
            automatic,
        )


def content_digest(record: Record, line: bytes) -> int:
    """64 bits of a hash of what a row says: not of its order of keys, spaces or format.

    Of a row that is nested too deeply to be written again, the line itself is hashed.
    """
    said = [record.messages, record.text, record.tools]
    try:
        text = orjson.dumps(said, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        text = line
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
