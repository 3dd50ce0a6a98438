"""write_report(directory): the page of a run, or of the runs below, as a file."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxlora.errors import CheckpointError, ConfigError
from mlxlora.files import atomic_file
from mlxlora.report.page import check_target, comparison_page, page
from mlxlora.runs import Run, find_runs, load_run
from mlxlora.sweep.board import SWEEP
from mlxlora.sweep.board import read as read_board

PAGE = "report.html"


@dataclass(frozen=True)
class Written:
    path: Path
    what: str
    runs: list[str]


def write_report(
    directory: Path,
    out: Path | None = None,
    evaluations: Sequence[Path] = (),
    fused: Path | None = None,
) -> Written:
    """Write report.html into directory, or to out; one that is there is replaced.

    Raises CheckpointError if there is no run, ConfigError for options of one run alone.
    """
    path = out or directory / PAGE
    check_target(path)
    found = find_runs(directory)
    if not found:
        raise CheckpointError(f"{directory} is no run, and there is none below it")
    if found == [directory]:
        html, what = page(load_run(directory), evaluations, fused), "one run"
    elif evaluations or fused is not None:
        raise ConfigError("--eval and --fused are of one run; name that run's directory")
    else:
        runs, left_out = _read(found)
        html = comparison_page(runs, directory.resolve().name, *_sweep(directory))
        what = "; ".join([f"{len(runs)} runs" if len(runs) > 1 else "one run", *left_out])
    _write(path, html)
    return Written(path, what, [str(each) for each in found])


def write_comparison(runs: Sequence[Run], path: Path, name: str = "Runs") -> None:
    """Write the page of these runs side by side. Raises CheckpointError if there are none."""
    if not runs:
        raise CheckpointError("there are no runs whose curves could be drawn")
    check_target(path)
    _write(path, comparison_page(runs, name))


def _write(path: Path, html: str) -> None:
    with atomic_file(path) as file:
        file.write(html.encode("utf-8"))


def _read(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and what is to be said of those that cannot be read. One at least can be."""
    runs, faults = [], []
    for path in paths:
        try:
            runs.append(load_run(path))
        except (CheckpointError, ConfigError) as error:
            faults.append(f"left out {path}: {error}")
    if not runs:
        raise CheckpointError("\n".join(faults))
    return runs, faults


def _sweep(directory: Path) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """What a sweep says of itself, and of each variant by its run's name; nothing if it is none."""
    if not (directory / SWEEP).is_file():
        return [], {}
    board = read_board(directory)
    states = {one.run: str(one.state) for one in board.variants}
    facts = [("recipe", board.recipe)]
    facts += [
        (f"{key} tried", ", ".join(str(value) for value in values))
        for key, values in board.grid.items()
    ]
    counts = ", ".join(f"{n} {state}" for state, n in Counter(states.values()).items())
    return [*facts, ("variants", f"{len(states)}: {counts}")], states
