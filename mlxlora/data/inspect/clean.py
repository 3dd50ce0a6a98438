"""A cleaned copy of the data: the lines that train something, once each, byte for byte.

Nothing is mended or reordered; whole lines are left out. The copy is whole or absent, and never
written over anything.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora.data.inspect.scan import Source, Table
from mlxlora.data.inspect.summary import REASONS, Inspection
from mlxlora.errors import ConfigError, DataError
from mlxlora.files import atomic_directory, atomic_file, refuse_existing

NEAR = ("near", "near_leaks")


@dataclass(frozen=True)
class Cleaned:
    """lines = the sum of kept + the sum of dropped."""

    path: Path
    lines: int  # that were not blank
    kept: dict[str, int]  # by file name
    dropped: dict[str, int]  # by reason, each line once

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "lines": self.lines,
            "kept": self.kept,
            "dropped": self.dropped,
        }


def check_target(out: Path, data: Path) -> None:
    """Raise before the work, not after it, if the copy could not be written there."""
    refuse_existing(out)
    if not data.is_dir() and out.suffix != ".jsonl":
        raise ConfigError(f"--fix {out}: the copy of a file is a file; name it *.jsonl")


def clean(inspection: Inspection, out: Path, near: bool) -> Cleaned:
    """Write the copy; near: without near copies too. The inspection must be of every row.

    Raises DataError if no row of train would be left, ExportError if out exists.
    """
    assert inspection.lengths.complete, "rows that train nothing are told by rendering them all"
    table = inspection.table
    left = np.ones(len(table), bool)
    dropped = {}
    for name in REASONS:
        marked = inspection.reasons[name] & left
        if marked.any() and (near or name not in NEAR):
            dropped[name] = int(marked.sum())
            left &= ~marked
    if not (left & (table.splits == 0)).any():
        raise DataError(f"no row of {inspection.path} would be left for training")
    refuse_existing(out)
    if table.automatic:
        _write(table, 0, left, out)
        kept = {out.name: int(left.sum())}
    else:
        kept = _write_directory(table, left, out)
    return Cleaned(out, len(table), kept, dropped)


def _write_directory(table: Table, left: np.ndarray, out: Path) -> dict[str, int]:
    """A file a split; one of which no row is left is not written: training refuses empty files."""
    kept = {}
    with atomic_directory(out) as directory:
        for number, source in enumerate(table.sources):
            name = f"{source.split}.jsonl"
            kept[name] = int(left[table.files == number].sum())
            if kept[name]:
                _write(table, number, left, directory / name)
    return kept


def _write(table: Table, number: int, left: np.ndarray, path: Path) -> None:
    source: Source = table.sources[number]
    with atomic_file(path) as file:
        for offset in table.offsets[left & (table.files == number)].tolist():
            file.write(source.line(offset))
