"""A run's directory: what it began with, its log, and who is using it.

run.toml is the resolved config and start.json what the run met when it began: the base, the
rows, the ways chosen for this machine. Both appear with the directory, in one rename; whoever
goes on with the run later must find the same again, or is told what changed.
"""

import dataclasses
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlxlora.config import RunConfig
from mlxlora.data.records import Splits
from mlxlora.errors import CheckpointError, ConfigError, printable
from mlxlora.files import (
    atomic_directory,
    hash_text,
    remove_directory,
    remove_leftovers,
    sync,
    write_json,
)
from mlxlora.model_files import Identity
from mlxlora.readers import expanded, read_json
from mlxlora.schema import by_key
from mlxlora.train.events import Done, Event, from_json, to_json
from mlxlora.train.places import CHECKPOINTS, CONFIG, LOG, START

PACKAGES = ("mlxlora", "mlx", "mlx-lm")


@dataclass(frozen=True)
class Origin:
    """What a run began with; plain values, in start.json."""

    run: dict[str, Any]  # the config
    base: dict[str, str]  # Identity
    data: dict[str, dict[str, Any]]  # split -> path, rows, digest
    ways: dict[str, Any]  # Ways.to_dict()
    versions: dict[str, str]
    folder: str  # that relative paths start from

    @classmethod
    def of(cls, run: RunConfig, base: Identity, splits: Splits, ways: dict[str, Any]) -> "Origin":
        folder = printable(str(Path.cwd()))
        return cls(run.to_dict(), base.to_dict(), describe(splits), ways, versions(), folder)

    def check(self, base: Identity, splits: Splits) -> None:
        """Raise CheckpointError, naming each difference, unless base and rows are the same."""
        faults = _changed_rows(self.data, describe(splits))
        now = base.to_dict()
        for key, label in (
            ("fingerprint", "weights"),
            ("quantization", "quantization"),
            ("template", "chat template"),
        ):
            if self.base.get(key) != now[key]:
                then = str(self.base.get(key))[:16]
                faults.append(f"base {now['name']}: other {label} ({then} then, {now[key][:16]})")
        if faults:
            raise CheckpointError(
                "the run cannot go on as it began; since then there changed:\n"
                + "\n".join(f"  {fault}" for fault in faults)
                + "\nPut them back as they were, or begin a new run."
            )

    def newer(self) -> list[str]:
        """Packages that are not what the run began with, in words."""
        now = versions()
        return [
            f"{name} was {then} when the run began and is {now.get(name)}: results may differ"
            for name, then in self.versions.items()
            if now.get(name) != then
        ]

    def find(self, path: str) -> str:
        """A relative path of the config as seen from here, or else from where the run began."""
        here = expanded(path)
        there = Path(self.folder) / here
        return str(there) if not here.exists() and there.exists() else path


def describe(splits: Splits) -> dict[str, dict[str, Any]]:
    """The files of the rows: where, how many rows, and a digest of them."""
    return {
        name: {"path": str(file.path), "rows": len(file), "digest": file.digest}
        for name, file in splits.files().items()
    }


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def create(path: Path, origin: Origin) -> None:
    """Make the run's directory: all of it appears at once. Raises ExportError if it exists."""
    with atomic_directory(path) as directory:
        (directory / CONFIG).write_text(RunConfig.from_dict(origin.run).to_toml(), "utf-8")
        rewrite(directory, origin)
        (directory / CHECKPOINTS).mkdir()
        (directory / LOG).touch()


def rewrite(path: Path, origin: Origin) -> None:
    """Keep a beginning, or another one: other ways to compute the same updates."""
    value = dataclasses.asdict(origin)
    write_json(path / START, {**value, "sha256": _hash(value)})


def _hash(value: dict[str, Any]) -> str:
    return hash_text(json.dumps(value, sort_keys=True))


def read(path: Path) -> tuple[RunConfig, Origin]:
    """The config and the beginning of a run. Raises CheckpointError if this is none."""
    if not (path / START).is_file():
        hint = "" if path.exists() else " (it does not exist)"
        raise CheckpointError(f"{path} is not a run of mlxlora: no {START}{hint}")
    try:
        value = read_json(path / START, CheckpointError)
        if value.pop("sha256", None) != _hash(value):
            raise ValueError("its hash differs")
        origin = Origin(**value)
        began = RunConfig.from_dict(origin.run)
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path / START} is damaged: {error}") from error
    changes = differences(began.to_dict(), RunConfig.load(path / CONFIG).to_dict())
    if changes:
        raise CheckpointError(
            f"{path / CONFIG} was changed since the run began:\n"
            + "\n".join(f"  {change}" for change in changes)
            + "\nPut it back, or begin a new run with these options."
        )
    return began, origin


def finished(path: Path) -> Done | None:
    """How the run ended, if it did; one that was interrupted did not."""
    try:
        *_, last = (path / LOG).read_bytes().splitlines()
        event = from_json(last)
    except (OSError, ValueError):
        return None
    return event if isinstance(event, Done) and event.reason != "interrupted" else None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from training in this directory; the system unlocks when we die.

    What a killed process left half-written is tidied up first. Raises CheckpointError if
    another one is at it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _lock(descriptor):
            raise CheckpointError(f"another process is training in {path} now")
        remove_leftovers(path)
        if (path / CHECKPOINTS).is_dir():
            remove_leftovers(path / CHECKPOINTS)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the lock was free, but for someone who only looked (in_use)."""
    for pause in (0.05, 0.2, 0):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(pause)
    return False


def in_use(path: Path) -> bool:
    """Whether a process is training in this directory now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def discard(path: Path) -> None:
    """Remove a run in which nothing was learned."""
    remove_directory(path)


class Log:
    """log.jsonl: an object a line for each event. What came after size is forgotten."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = path.open("ab", buffering=0)
        self._size = min(self._file.tell(), size)
        self._file.truncate(self._size)

    def write(self, event: Event) -> None:
        """Raises OSError, with no part of the line in the file, if there is no room for it."""
        line = to_json(event).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            self._file.truncate(self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._size += written

    def settle(self) -> int:
        """Put what was written on disk; return the size."""
        sync(self._file.fileno())
        return self._size

    def close(self) -> None:
        self._file.close()


def _changed_rows(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    faults = []
    for name in ("train", "valid"):  # training does not read the test rows
        if name not in then and name not in now:
            continue
        old, new = then.get(name), now.get(name)
        if old is None or new is None:
            what = "are new" if old is None else "are gone"
            faults.append(f"{name} rows {what}")
        elif old["digest"] != new["digest"]:
            rows = f"{old['rows']:,} rows then, {new['rows']:,} now"
            same = f"{new['rows']:,} rows as before, not all the same"
            faults.append(
                f"{name} rows: {new['path']} ({same if old['rows'] == new['rows'] else rows})"
            )
    return faults


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Options that differ between two configs of the same keys."""
    new = by_key(now)
    return [
        f"{key}: {old!r} then, {new[key]!r} now"
        for key, old in by_key(then).items()
        if old != new[key]
    ]
