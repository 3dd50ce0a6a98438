"""Results row by row: all of them as JSONL, and the rows on which a model is worst."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxlora.data.records import RowFile, Rows, opened
from mlxlora.errors import ExportError
from mlxlora.evaluation.answers import Answer, texts
from mlxlora.evaluation.results import Result
from mlxlora.files import atomic_file
from mlxlora.lora.adapter import Adapter


@dataclass(frozen=True)
class Bad:
    """A row on which a model is bad, and what each model made of it."""

    where: str  # file:line
    prompt: str | None
    wanted: str
    models: dict[str, dict[str, Any]]  # name -> answer, loss, tokens, metrics


def write_rows(path: Path, rows: Rows, results: Sequence[Result]) -> None:
    """An object a line: the row's place, what it asks and wants, and what each model gave."""
    lines = lines_of(rows.file)
    answered = _by_row(results)
    with atomic_file(path) as file:
        for record in rows:
            prompt, wanted = texts(record)
            value = {
                "row": f"{rows.file.path}:{lines[record.row]}",
                "prompt": prompt,
                "wanted": wanted,
                "models": _models(results, answered, record.row),
            }
            file.write((json.dumps(value, ensure_ascii=False) + "\n").encode(errors="replace"))


def lines_of(file: RowFile) -> np.ndarray:
    """The line of every row of a file, from 1, (rows,) int64, in one pass."""
    found = np.ones(len(file.offsets), np.int64)
    start, before = 0, 0  # of the block; line ends in front of it
    with opened(file.path) as text:
        while block := text.read(1 << 20):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            first, last = np.searchsorted(file.offsets, [start, start + len(block)])
            places = file.offsets[first:last] - start
            found[first:last] += before + np.searchsorted(ends, places)
            start, before = start + len(block), before + len(ends)
    return found


def trained_on(adapter: Adapter, rows: Rows) -> bool:
    """Whether the adapter's own training rows are of this very file."""
    files = adapter.provenance.get("data", {}).get("files", {})
    return bool(files.get("train", {}).get("digest") == rows.file.digest)


def check_place(path: Path, key: str) -> None:
    """Raise ExportError for a file that holds anything but an earlier result (it has this key)."""
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            text = file.readline() if path.suffix == ".jsonl" else file.read()
        ours = key in json.loads(text)
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise ExportError(f"{path} exists and is no earlier result; choose another name")


def worst_rows(rows: Rows, results: Sequence[Result], result: Result, count: int) -> list[Bad]:
    """The rows where one of the models is worst: by its first metric, or else by its loss.

    Of rows that score alike, those of the highest loss; none that score as well as can be.
    """
    answered = _by_row(results)
    metric = next(iter(result.metrics), None)

    def badness(row: int) -> tuple[float, float]:
        found = result.losses.find(row) if result.losses else None
        loss = found[0] if found and not math.isnan(found[0]) else math.inf
        return (answered[result.name][row].scores[metric] if metric else 0.0, -loss)

    assert result.losses is not None
    numbers = list(answered[result.name]) if metric else result.losses.rows.tolist()
    order = sorted(numbers, key=badness)
    if metric:
        best = max(answer.scores[metric] for answer in result.answers)
        order = [row for row in order if badness(row)[0] < max(best, 1.0)]
    found = []
    for row in order[:count]:
        prompt, wanted = texts(rows.file.read(row))
        models = _models(results, answered, row)
        found.append(Bad(rows.file.where(row), prompt, wanted, models))
    return found


def _by_row(results: Sequence[Result]) -> dict[str, dict[int, Answer]]:
    return {result.name: {a.row: a for a in result.answers} for result in results}


def _models(
    results: Sequence[Result], answered: dict[str, dict[int, Answer]], row: int
) -> dict[str, dict[str, Any]]:
    """What each model made of a row; JSON knows no NaN."""
    models = {}
    for result in results:
        told: dict[str, Any] = {}
        if (answer := answered[result.name].get(row)) is not None:
            told = {"answer": answer.got, "metrics": dict(answer.scores)}
        if result.losses and (found := result.losses.find(row)) is not None:
            told["loss"] = found[0] if math.isfinite(found[0]) else None
            told["tokens"] = found[1]
        models[result.name] = told
    return models
