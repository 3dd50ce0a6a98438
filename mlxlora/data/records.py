"""JSONL -> Record, streamed: a file is scanned once and only the rows' offsets stay.

Twelve bytes a row: where it starts, and a hash that decides between training and
validation (so equal rows land on the same side). Every row is parsed during the scan, so a
bad one is found before training and not in the tenth hour. Nothing here knows tokens.
"""

import gzip
import hashlib
import itertools
import shutil
import tempfile
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import orjson

from mlxlora.config import DataConfig
from mlxlora.errors import DataError

Row = dict[str, Any]
Message = dict[str, Any]
MAX_VALID_ROWS = 1000  # of a file that is split automatically
FAULTS_SHOWN = 5

_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}
_FORMATS_TEXT = (
    '{"messages": [{"role", "content"}]}, {"prompt", "completion"}, {"text"}, '
    '{"instruction", "input"?, "output"}, {"conversations": [{"from", "value"}]}'
)


@dataclass(frozen=True)
class Record:
    """One row, whatever its format was: a conversation or plain text."""

    row: int  # 0-based position in its file, blank and skipped lines not counted
    kind: Literal["chat", "completion", "text"]
    messages: tuple[Message, ...] = ()  # chat and completion
    text: str = ""  # text
    tools: tuple[Row, ...] | None = None


class RowFault(Exception):
    """Why a row cannot be used; the file and line are added where they are known."""


# --- one row -----------------------------------------------------------------------------


def parse(row: Any, columns: Mapping[str, str]) -> Record:
    """The record in a parsed JSON value. columns renames keys: {our name: the row's name}.

    Raises RowFault naming what is wrong and, for unknown keys, which keys were found.
    """
    if not isinstance(row, dict):
        raise RowFault(f"a row must be a JSON object, this is {_json_kind(row)}")
    if columns:
        row = {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}
    for key, reader in READERS.items():
        if key in row:
            if "chosen" in row:
                raise RowFault("rows with 'chosen' are preference pairs, not yet trained on")
            return reader(row)
    raise RowFault(_unknown_keys(row))


def _messages(row: Row) -> Record:
    return _conversation(row["messages"], "role", "content", row.get("tools"))


def _conversations(row: Row) -> Record:
    return _conversation(row["conversations"], "from", "value", row.get("tools"))


def _completion(row: Row) -> Record:
    return _pair(_text(row, "prompt"), _text(row, "completion"))


def _instruction(row: Row) -> Record:
    instruction, extra = _text(row, "instruction"), row.get("input") or ""
    if not isinstance(extra, str):
        raise RowFault(f"'input' must be text, this is {_json_kind(extra)}")
    return _pair(f"{instruction}\n\n{extra}" if extra else instruction, _text(row, "output"))


def _plain_text(row: Row) -> Record:
    return Record(row=-1, kind="text", text=_text(row, "text"))


# A new row format is one function and one line: the key that tells it -> its reader.
READERS: dict[str, Callable[[Row], Record]] = {
    "messages": _messages,
    "conversations": _conversations,
    "prompt": _completion,
    "instruction": _instruction,
    "text": _plain_text,
}


def _pair(prompt: str, completion: str) -> Record:
    messages = (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    )
    return Record(row=-1, kind="completion", messages=messages)


def _conversation(turns: Any, role_key: str, content_key: str, tools: Any) -> Record:
    if not isinstance(turns, list) or not turns:
        raise RowFault("the conversation must be a list with at least one message")
    if tools is not None and not isinstance(tools, list):
        raise RowFault(f"'tools' must be a list, this is {_json_kind(tools)}")
    messages = tuple(
        _message(turn, role_key, content_key, number) for number, turn in enumerate(turns, 1)
    )
    if not any(message["role"] == "assistant" for message in messages):
        raise RowFault("no assistant turn, so there is nothing to train on")
    return Record(row=-1, kind="chat", messages=messages, tools=tuple(tools) if tools else None)


def _message(turn: Any, role_key: str, content_key: str, number: int) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
        raise RowFault(f"message {number} has no '{role_key}'")
    role = _ROLES.get(turn[role_key], turn[role_key])
    content = turn.get(content_key)
    if isinstance(content, list):  # content parts: only text can be trained on here
        content = "".join(_part(part, number) for part in content)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowFault(
            f"message {number} ({role}): '{content_key}' must be text, "
            f"this is {_json_kind(content)}"
        )
    rest = {k: v for k, v in turn.items() if k not in (role_key, content_key)}
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], number)
    return {"role": role, "content": content, **rest}


def _tool_calls(calls: Any, number: int) -> list[Row]:
    """OpenAI writes arguments as JSON text; chat templates want the object itself."""
    if not isinstance(calls, list):
        raise RowFault(f"message {number}: 'tool_calls' must be a list")
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault(f"message {number}: a tool call needs a function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = orjson.loads(arguments or "{}")
            except orjson.JSONDecodeError as error:
                raise RowFault(f"message {number}: tool call arguments: {error}") from error
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed


def _part(part: Any, number: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part["text"], str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else _json_kind(part)
    raise RowFault(f"message {number} holds a part of type {kind!r}; only text can be trained")


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        raise RowFault(f"'{key}' is missing; the row has {_names(row)}")
    if not isinstance(value, str):
        raise RowFault(f"'{key}' must be text, this is {_json_kind(value)}")
    return value


def _unknown_keys(row: Row) -> str:
    texts = [key for key, value in row.items() if isinstance(value, str)]
    example = dict(zip(("prompt", "completion"), texts, strict=False))
    if len(texts) == 1:
        example = {"text": texts[0]}
    hint = " ".join(f"--set data.columns.{ours}={theirs}" for ours, theirs in example.items())
    return f"no known row format in the keys {_names(row)}. Known: {_FORMATS_TEXT}." + (
        f" Name the columns, for example: {hint}" if hint else ""
    )


def _names(row: Row) -> str:
    return ", ".join(repr(key) for key in itertools.islice(row, 12)) or "(none)"


def _json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true/false"}
    return kinds.get(type(value), "null" if value is None else "a number")


# --- one file ----------------------------------------------------------------------------


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
        self._file = _opened(path)
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
        self._file.seek(int(self.offsets[row]))
        record = parse(orjson.loads(self._file.readline()), self._columns)
        return Record(row, record.kind, record.messages, record.text, record.tools)

    def where(self, row: int) -> str:
        """file:line of a row, for messages; counts the lines before it."""
        self._file.seek(0)
        left, line = int(self.offsets[row]), 1
        while left > 0:
            block = self._file.read(min(left, 1 << 20))
            line += block.count(b"\n")
            left -= len(block)
        return f"{self.path}:{line}"

    def _scan(self) -> tuple[np.ndarray, np.ndarray]:
        offsets, hashes = array("q"), array("I")
        position = faults = 0
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
            return _broken_line(line, error)
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


def _opened(path: Path) -> IO[bytes]:
    """A seekable stream of the file's text; gzip is unpacked into an unnamed temporary file."""
    try:
        if path.suffix != ".gz":
            return path.open("rb", buffering=1 << 18)
        return _unpacked(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _unpacked(path: Path) -> IO[bytes]:
    plain = tempfile.TemporaryFile(buffering=1 << 18)  # noqa: SIM115 (closed with the RowFile)
    try:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except BaseException:
        plain.close()
        raise
    plain.seek(0)
    return plain


def _broken_line(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as bad:
        near = line[max(0, bad.start - 20) : bad.start + 20].decode("utf-8", "replace")
        return f"not UTF-8 at byte {bad.start + 1} of the line, near {near!r}"
    near = text[max(0, error.pos - 25) : error.pos + 25].strip()
    return f"not valid JSON ({error.msg.split(':')[0]}), near {near!r}"


# --- what a run reads --------------------------------------------------------------------


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


def open_splits(data: DataConfig, seed: int) -> Splits:
    """Scan data.path: one file (split by a seeded hash of each row) or a directory.

    Raises DataError for a path that is missing, empty, or holds bad rows.
    """
    path = Path(data.path).expanduser()
    if path.is_dir():
        train = _in_directory(path, "train", data)
        if train is None:
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise DataError(f"{path} has no train.jsonl or train.jsonl.gz (it holds {found})")
        valid = _in_directory(path, "valid", data)
        return Splits(train, valid, _in_directory(path, "test", data))
    return _split(open_file(path, data).file, data.valid_fraction, seed)


def open_file(path: Path, data: DataConfig) -> Rows:
    """All rows of one file. Raises DataError if it is missing or has bad rows."""
    if not path.exists():
        raise DataError(f"no data at {path}: give a .jsonl file or a directory with train.jsonl")
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        raise DataError(f"{path} is not a .jsonl or .jsonl.gz file")
    file = RowFile(path, data)
    return Rows(file, np.arange(len(file)))


def _in_directory(directory: Path, name: str, data: DataConfig) -> Rows | None:
    for suffix in (".jsonl", ".jsonl.gz"):
        if (directory / (name + suffix)).exists():
            return open_file(directory / (name + suffix), data)
    return None


def _split(file: RowFile, fraction: float, seed: int) -> Splits:
    """Rows whose seeded hash is small validate; equal rows always land on the same side."""
    fraction = min(fraction, MAX_VALID_ROWS / len(file))
    salt = np.uint32(zlib.crc32(f"split {seed}".encode()))
    # A multiplicative hash (Knuth): the low bits of a salted CRC spread over all 32.
    mixed = (file.hashes ^ salt) * np.uint32(2654435761)
    validates = mixed < np.uint32(fraction * 0xFFFFFFFF)
    valid, train = np.flatnonzero(validates), np.flatnonzero(~validates)
    if not len(train):
        raise DataError(f"{file.path} has too few rows to split; add rows or a valid.jsonl")
    return Splits(Rows(file, train), Rows(file, valid) if len(valid) else None, None)
