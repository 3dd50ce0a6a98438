"""inspect(data, tokenizer): what training will be given, as one value. Nothing is trained.

The command line, the report page and --fix look at the same Inspection.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora.config import DataConfig
from mlxlora.data.inspect.advice import advise, verdict
from mlxlora.data.inspect.copies import Copies, find_copies
from mlxlora.data.inspect.lengths import Lengths, measure, spread_rows
from mlxlora.data.inspect.scan import BAD, Progress, Table, scan
from mlxlora.data.inspect.template import CHECKED, Finding, check_template
from mlxlora.data.records import SPLITS
from mlxlora.data.render import Renderer
from mlxlora.data.shown import Piece, pieces
from mlxlora.errors import DataError

COPIES_SHOWN = 20  # pairs of each kind, in the result for programs
# Why a line is left out of a cleaned copy, the first reason that holds.
REASONS = {
    "bad": "cannot be used",
    "format": "are of another kind of row",
    "refused": "cannot be rendered",
    "nothing": "train nothing",
    "exact": "are copies",
    "leaks": "of train are held out too",
    "near": "of train are near copies",
    "near_leaks": "of train are near a row held out",
}


@dataclass(frozen=True)
class Shown:
    """A row as the model will see it, cut where training cuts it."""

    where: str  # file:line
    tokens: int
    supervised: int
    truncated: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Part:
    """The rows of one split."""

    split: str
    path: Path
    rows: int


@dataclass(frozen=True)
class Inspection:
    """What is in the data. Rows are usable lines of the kind that most rows have."""

    path: str
    parts: tuple[Part, ...]
    lines: int  # that are not blank
    formats: dict[str, int]  # rows by format
    examples: tuple[Shown, ...]
    lengths: Lengths
    findings: tuple[Finding, ...]
    verdict: Finding
    table: Table = field(repr=False)
    copies: Copies | None = field(repr=False)
    reasons: dict[str, np.ndarray] = field(repr=False)  # of REASONS: (n,) bool, lines left out

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "data": self.path,
            "parts": [{**asdict(part), "path": str(part.path)} for part in self.parts],
            "lines": self.lines,
            "formats": self.formats,
            "bad_lines": asdict(self.table.faults),
            "lengths": {**asdict(self.lengths), "complete": self.lengths.complete},
            "copies": self._copies(),
            "examples": [asdict(example) for example in self.examples],
            "findings": [asdict(finding) for finding in self.findings],
            "verdict": self.verdict.found,
            "ready": self.verdict.state != "fail",
        }

    def _copies(self) -> dict[str, Any]:
        if self.copies is None:
            return {}
        return {name: self._pairs(found) for name, found in self.copies.found.items()}

    def _pairs(self, copy_of: np.ndarray) -> dict[str, Any]:
        rows = np.flatnonzero(copy_of >= 0)
        where = self.table.where
        first = [[where(row), where(int(copy_of[row]))] for row in rows[:COPIES_SHOWN].tolist()]
        return {"rows": len(rows), "examples": first}


def inspect(
    data: DataConfig,
    tokenizer: Any,
    *,
    seed: int = 0,
    rows: int = 3,
    every: bool = False,
    copies: bool = True,
    near: bool = True,
    progress: Progress = lambda what, done, of: None,
) -> Inspection:
    """Look at data.path as this tokenizer's model will see it.

    rows: how many are shown; every: count the tokens of all rows, not of a sample; copies and
    near: look for rows that are there twice, exactly and nearly. seed is train.seed: it splits a
    single file. Raises DataError if there is nothing to look at.
    """
    table = scan(data, seed, progress)
    usable = table.of_kind
    measured = measure(table, usable, data, tokenizer, every, progress)
    reasons = {name: np.zeros(len(table), bool) for name in REASONS}
    reasons["bad"] = table.formats == BAD
    reasons["format"] = ~usable & ~reasons["bad"]
    reasons["refused"][measured.refused] = True
    reasons["nothing"][measured.nothing] = True
    left = usable & ~reasons["refused"] & ~reasons["nothing"]
    found = find_copies(table, left, near, progress) if copies else None
    if found is not None:
        reasons |= {name: copy_of >= 0 for name, copy_of in found.found.items()}
    trained = np.flatnonzero(usable & (table.splits == 0))
    checked = [(table.where(row), table.record(row)) for row in spread_rows(trained, CHECKED)]
    findings = (
        *advise(table, data, measured.lengths, found),
        *check_template(tokenizer, data, checked),
        *(Finding("warn", "template", note) for note in measured.notes),
    )
    return Inspection(
        path=data.path,
        parts=_parts(table, usable),
        lines=len(table),
        formats=table.counts,
        examples=tuple(_examples(table, trained, rows, Renderer(tokenizer, data), tokenizer)),
        lengths=measured.lengths,
        findings=findings,
        verdict=verdict(findings),
        table=table,
        copies=found,
        reasons=reasons,
    )


def _parts(table: Table, usable: np.ndarray) -> tuple[Part, ...]:
    parts = []
    for place, split in enumerate(SPLITS):
        here = np.flatnonzero(table.splits == place)
        if len(here):
            path = table.sources[table.files[here[0]]].path
            parts.append(Part(split, path, int(usable[here].sum())))
    return tuple(parts)


def _examples(
    table: Table, rows: np.ndarray, count: int, renderer: Renderer, tokenizer: Any
) -> list[Shown]:
    shown = []
    for row in spread_rows(rows, count):
        try:
            example = renderer(table.record(row))
        except DataError:  # among the refused
            continue
        shown.append(
            Shown(
                table.where(row),
                len(example.tokens),
                example.supervised,
                example.truncated,
                pieces(example, tokenizer),
            )
        )
    return shown
