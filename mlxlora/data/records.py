"""JSONL -> Record, streamed: a file is scanned once and only the rows' offsets stay.

Twelve bytes a row: where it starts, and a hash that decides between training and
validation (so equal rows land on the same side). Every row is parsed during the scan, so a
bad one is found before training and not in the tenth hour. What a row may look like is
formats.py's business.
"""

import gzip
import hashlib
import os
import tempfile
import threading
import weakref
import zlib
from array import array
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import orjson

from mlxlora.config import DataConfig
from mlxlora.data.formats import Record, RowFault, parse
from mlxlora.errors import DataError
from mlxlora.readers import expanded, file_size

MAX_VALID_ROWS = 1000  # of a file that is split automatically
FAULTS_SHOWN = 5
SPLITS = ("train", "valid", "test")


class RowFile:
    """A JSONL file (.jsonl or .jsonl.gz) whose rows are read by number, from disk.

    Raises DataError at once for every kind of bad row, unless data.on_bad_row is "skip",
    in which case .skipped counts them by reason and .examples keeps the first few.
    """

    def __init__(self, path: Path, data: DataConfig) -> None:
        self.path = path
        self.kind = ""  # of the first row; a row of another kind is a bad row
        self.skipped = 0
        self.examples: list[str] = []
        self._columns = data.columns
        self._skip = data.on_bad_row == "skip"
        self._plain_keys: set[str] | None = None
        self._file = opened(path)
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)
        self.offsets, self.hashes = self._scan()
        self.digest = hashlib.sha256(self.hashes.tobytes()).hexdigest()  # of the usable rows
        if not len(self.offsets):
            raise DataError(
                f"{path} has no usable rows"
                + (f" ({self.skipped} skipped)" if self.skipped else " (it is empty)")
                + "".join(f"\n  {example}" for example in self.examples)
            )

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, row: int) -> Record:
        """The record at this 0-based row."""
        with self._lock:  # rows of one file may be read ahead in another thread
            self._file.seek(int(self.offsets[row]))
            line = self._file.readline()
        record = parse(orjson.loads(line), self._columns)
        return Record(row, record.kind, record.messages, record.text, record.tools)

    def where(self, row: int) -> str:
        """file:line of a row, for messages; counts the lines before it."""
        left, line = int(self.offsets[row]), 1
        with self._lock:
            self._file.seek(0)
            while left > 0:
                block = self._file.read(min(left, 1 << 20))
                line += block.count(b"\n")
                left -= len(block)
        return f"{self.path}:{line}"

    def _scan(self) -> tuple[np.ndarray, np.ndarray]:
        offsets, hashes = array("q"), array("I")
        faults = 0
        # Some editors open a text file with a byte order mark, which is no part of the row.
        position = len(BOM_UTF8) if self._file.read(3) == BOM_UTF8 else 0
        self._file.seek(position)
        for number, line in enumerate(self._file, 1):
            if not line.isspace():
                fault = self._check(line)
                if fault is None:
                    offsets.append(position)
                    hashes.append(zlib.crc32(line))
                else:
                    faults += 1
                    if len(self.examples) < FAULTS_SHOWN:
                        self.examples.append(f"{self.path}:{number}: {fault}")
                    if not self._skip and not self.kind:
                        break  # the first row is bad, so most likely all are, in the same way
            position += len(line)
        if faults and not self._skip:
            raise DataError(self._faults(faults))
        self.skipped = faults
        return np.asarray(offsets, np.int64), np.asarray(hashes, np.uint32)

    def _check(self, line: bytes) -> str | None:
        """Why this line cannot be used, or None."""
        try:
            row = orjson.loads(line)
            if (
                type(row) is dict
                and row.keys() == self._plain_keys
                and all(type(value) is str for value in row.values())
            ):
                return None  # the same keys as a good row, all text: nothing left to check
            record = parse(row, self._columns)
        except orjson.JSONDecodeError as error:
            return broken_line(line, error)
        except RowFault as fault:
            return str(fault)
        if not self.kind:
            self.kind = record.kind
        if record.kind != self.kind:
            return f"a {record.kind} row in a file of {self.kind} rows; keep one format a file"
        if all(type(value) is str for value in row.values()):
            self._plain_keys = set(row)
        return None

    def _faults(self, count: int) -> str:
        shown = "\n".join(self.examples)
        if count == 1:
            return f"{shown}\nMend the row, or pass --on-bad-row skip."
        more = f"\n  and {count - len(self.examples)} more" if count > len(self.examples) else ""
        rows = "\n".join(f"  {example}" for example in self.examples)
        return f"{count} bad rows:\n{rows}{more}\nMend them, or pass --on-bad-row skip."


def opened(path: Path, seen: Callable[[int], None] = lambda count: None) -> IO[bytes]:
    """A seekable stream of the file's text; gzip is unpacked into an unnamed temporary file.

    seen is told, while unpacking, how many bytes of the packed file have been read.
    """
    file_size(path, DataError)
    try:
        if path.suffix != ".gz":
            return path.open("rb", buffering=1 << 18)
        return _unpacked(path, seen)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _unpacked(path: Path, seen: Callable[[int], None]) -> IO[bytes]:
    plain = tempfile.TemporaryFile(buffering=1 << 18)  # noqa: SIM115 (closed with the RowFile)
    try:
        with path.open("rb") as packed, gzip.open(packed, "rb") as unpacked:
            while block := unpacked.read(1 << 20):
                plain.write(block)
                seen(packed.tell())
    except BaseException:
        plain.close()
        raise
    plain.seek(0)
    return plain


def broken_line(line: bytes, error: orjson.JSONDecodeError) -> str:
    """Why a line is no JSON, with what stands near the fault."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as bad:
        near = line[max(0, bad.start - 20) : bad.start + 20].decode("utf-8", "replace")
        return f"not UTF-8 at byte {bad.start + 1} of the line, near {near!r}"
    if text.strip() == "[":
        return "this looks like one JSON array; JSONL has an object on every line"
    near = text[max(0, error.pos - 25) : error.pos + 25].strip()
    return f"not valid JSON ({error.msg.split(':')[0]}), near {near!r}"


@dataclass(frozen=True)
class Rows:
    """Some of a file's rows, in file order, by number 0..len-1."""

    file: RowFile
    index: np.ndarray  # (n,) row numbers in the file

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Record:
        return self.file.read(int(self.index[number]))

    def __iter__(self) -> Iterator[Record]:
        return (self[number] for number in range(len(self)))

    def where(self, record: Record) -> str:
        return self.file.where(record.row)


@dataclass(frozen=True)
class Splits:
    """The rows of a run. valid and test are None when there are none."""

    train: Rows
    valid: Rows | None
    test: Rows | None

    @property
    def kind(self) -> str:
        return self.train.file.kind

    def files(self) -> dict[str, RowFile]:
        named = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: rows.file for name, rows in named.items() if rows is not None}

    def skipped(self) -> Counter[str]:
        return Counter({str(f.path): f.skipped for f in self.files().values() if f.skipped})


def data_files(data: DataConfig) -> dict[str, Path]:
    """The files of data.path by their split; "" names a file that is split automatically.

    Raises DataError if it is missing, no JSONL file or a directory without train.jsonl.
    """
    path = expanded(data.path)
    if not os.path.isdir(path):
        _check_name(path)
        return {"": path}
    found = {name: file for name in SPLITS if (file := _named(path, name)) is not None}
    if "train" not in found:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise DataError(f"{path} has no train.jsonl or train.jsonl.gz (it holds {there})")
    return found


def open_splits(data: DataConfig, seed: int) -> Splits:
    """Scan data.path: one file (split by a seeded hash of each row) or a directory.

    Raises DataError for a path that is missing, empty, or holds bad rows.
    """
    files = {name: open_file(path, data) for name, path in data_files(data).items()}
    if "" in files:
        return _split(files[""].file, data.valid_fraction, seed)
    splits = Splits(files["train"], files.get("valid"), files.get("test"))
    for file in splits.files().values():
        if file.kind != splits.kind:
            raise DataError(
                f"{file.path} has {file.kind} rows and {splits.train.file.path} {splits.kind} "
                "rows; keep one format in a directory"
            )
    return splits


def open_file(path: Path, data: DataConfig) -> Rows:
    """All rows of one file. Raises DataError if it is missing or has bad rows."""
    _check_name(path)
    file = RowFile(path, data)
    return Rows(file, np.arange(len(file)))


def _check_name(path: Path) -> None:
    if not os.path.lexists(path):
        raise DataError(f"no data at {path}: give a .jsonl file or a directory with train.jsonl")
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        raise DataError(f"{path} is not a .jsonl or .jsonl.gz file")


def _named(directory: Path, name: str) -> Path | None:
    paths = (directory / (name + suffix) for suffix in (".jsonl", ".jsonl.gz"))
    return next((path for path in paths if os.path.lexists(path)), None)


def kept_for_validation(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows of a file that is split automatically validate, (n,) bool, by their hashes."""
    fraction = min(fraction, MAX_VALID_ROWS / max(1, len(hashes)))
    salt = np.uint32(zlib.crc32(f"split {seed}".encode()))
    # A multiplicative hash (Knuth): the low bits of a salted CRC spread over all 32.
    mixed = (hashes ^ salt) * np.uint32(2654435761)
    return np.asarray(mixed < np.uint32(fraction * 0xFFFFFFFF))


def _split(file: RowFile, fraction: float, seed: int) -> Splits:
    """Rows whose seeded hash is small validate; equal rows always land on the same side."""
    validates = kept_for_validation(file.hashes, fraction, seed)
    valid, train = np.flatnonzero(validates), np.flatnonzero(~validates)
    if not len(train):
        raise DataError(f"{file.path} has too few rows to split; add rows or a valid.jsonl")
    return Splits(Rows(file, train), Rows(file, valid) if len(valid) else None, None)
