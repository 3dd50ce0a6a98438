"""Rows that stand in the data more than once, and rows of train that are held out too.

Exact copies say the same, whatever the order of keys, the spaces or the format of the line. Near
ones are similar.py's. Of several copies the first one counts as the row itself.
"""

from dataclasses import dataclass

import numpy as np

from mlxlora.data.inspect.scan import Progress, Table
from mlxlora.data.inspect.similar import find_similar


@dataclass(frozen=True)
class Copies:
    """For each line of the table the row that it is a copy of, or -1. Each line has one kind."""

    exact: np.ndarray  # (n,) int32: an earlier row of the same split with equal content
    leaks: np.ndarray  # (n,) int32: rows of train equal to a row held out
    near: np.ndarray  # (n,) int32: rows of train similar to an earlier one
    near_leaks: np.ndarray  # (n,) int32: rows of train similar to one held out
    compared: bool  # near copies were looked for
    complete: bool  # and all candidates compared

    @property
    def found(self) -> dict[str, np.ndarray]:
        return {
            "exact": self.exact,
            "leaks": self.leaks,
            "near": self.near,
            "near_leaks": self.near_leaks,
        }


def find_copies(table: Table, usable: np.ndarray, near: bool, progress: Progress) -> Copies:
    """Compare the usable rows (n,) bool; near: also by similarity."""
    count = len(table)
    rows = np.flatnonzero(usable).astype(np.int32)
    train, held = rows[table.splits[rows] == 0], rows[table.splits[rows] > 0]
    exact, leaks, similar, similar_leaks = (np.full(count, -1, np.int32) for _ in range(4))
    for split in np.unique(table.splits[rows]):
        _mark_equal(table.digests, rows[table.splits[rows] == split], exact)
    train, held = train[exact[train] < 0], held[exact[held] < 0]
    leaks[train] = _same_as(table.digests, train, held)
    train = train[leaks[train] < 0]
    complete = True
    if near and len(train):
        found = find_similar(table, train, held, progress)
        similar_leaks[train] = found.leaks
        similar[train] = np.where(found.leaks < 0, found.copies, -1)
        complete = found.complete
    return Copies(exact, leaks, similar, similar_leaks, near, complete)


def _mark_equal(digests: np.ndarray, rows: np.ndarray, copy_of: np.ndarray) -> None:
    """For each of the rows but the first of equal digest: that first one."""
    order = rows[np.argsort(digests[rows], kind="stable")]
    ordered = digests[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    copy_of[order[again]] = order[np.searchsorted(ordered, ordered[again])]


def _same_as(digests: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(rows,) one of the others of equal digest, or -1."""
    if not len(others):
        return np.full(len(rows), -1, np.int32)
    order = others[np.argsort(digests[others], kind="stable")]
    places = np.searchsorted(digests[order], digests[rows])
    candidates = order[np.minimum(places, len(order) - 1)]
    return np.where(digests[candidates] == digests[rows], candidates, -1).astype(np.int32)
