"""mlxlora runs, and mlxlora runs diff."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mlxlora.errors import CheckpointError, ConfigError
from mlxlora.readers import expanded
from mlxlora.verbs.options import AsJson

DIFF = "diff"


def runs(
    places: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DIR",
            help="directories with runs in them, by default runs; or: diff and two runs or more",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.html", help="their curves over each other, as a page"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Past runs, best first. `runs diff A B` says what differs between two."""
    named = [expanded(place) for place in places or ()]
    if named and str(named[0]) == DIFF and len(named) > 1:
        _diff(named[1:], plot, as_json)
        return
    from mlxlora.comparison import as_json as told
    from mlxlora.comparison import ranked
    from mlxlora.console import Screen
    from mlxlora.runs import find_runs, load_run
    from mlxlora.show_runs import show_ranked

    screen = Screen(as_json)
    paths = [path for place in named or [Path("runs")] for path in find_runs(place)]
    found, faults = [], []
    for path in dict.fromkeys(paths):
        try:
            found.append(load_run(path))
        except (CheckpointError, ConfigError) as error:
            faults.append(f"{path}: {error}")
    groups = ranked(found)
    show_ranked(screen, groups)
    for fault in faults:
        screen.say(f"left out: {fault}", "yellow")
    if plot is not None:
        _plot(screen, found, expanded(plot))
    ordered = [told(run) for group in groups for run in group.runs]
    screen.result({"runs": ordered, "left_out": faults})


def _diff(paths: list[Path], plot: Path | None, as_json: bool) -> None:
    if len(paths) < 2:
        raise ConfigError("runs diff needs two runs or more: mlxlora runs diff A B")
    from mlxlora.comparison import differences
    from mlxlora.console import Screen
    from mlxlora.runs import load_run
    from mlxlora.show_runs import show_differences

    screen = Screen(as_json)
    found = [load_run(path) for path in paths]
    apart = differences(found)
    show_differences(screen, found, apart)
    if plot is not None:
        _plot(screen, found, expanded(plot))
    screen.result(
        {
            "runs": [str(run.path) for run in found],
            "differences": {one.what: list(one.values) for one in apart},
        }
    )


def _plot(screen: Any, found: list[Any], path: Path) -> None:
    from mlxlora.report.write import write_comparison

    write_comparison(found, path)
    screen.say(f"\ncurves: {path}")
