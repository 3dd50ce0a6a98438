"""Runs on the screen: ranked, and what differs between them."""

import os
from collections.abc import Sequence
from pathlib import Path

from mlxlora.comparison import Difference, Group, seconds
from mlxlora.console import Screen, clock
from mlxlora.runs import Run

WIDE = 110  # columns from which there is room for all figures


def show_ranked(screen: Screen, groups: Sequence[Group]) -> None:
    """A table a group, best first; what is left of a narrow screen's columns is in --json."""
    runs = [run for group in groups for run in group.runs]
    if not runs:
        screen.say("No runs here yet; mlxlora train makes one.")
        return
    wide = screen.console.width >= WIDE
    columns = ["run", "state", *["base", "method"] * wide, "rank", "rate", "updates"]
    columns += ["before", "loss", *["time"] * wide]
    for number, group in enumerate(groups):
        if len(groups) > 1:
            if number:
                screen.say()
            screen.say(f"{group.title}; not to be compared with other groups", "dim")
        screen.table(columns, [_row(run, wide) for run in group.runs])
    best = groups[0].runs[0]
    if best.best is not None:
        screen.say()
        screen.command("mlxlora", "report", _near(best.path), indent="")


def _row(run: Run, wide: bool) -> list[str]:
    rate = f"{run.start.learning_rate:.2g}" if run.start is not None else ""
    before = f"{run.before:.4f}" if run.before is not None else ""
    loss = f"{run.best.loss:.4f}" if run.best is not None else ""
    base = [Path(run.origin.base.get("name", "")).name, run.config.lora.method] * wide
    figures = [str(run.config.lora.rank), rate, f"{run.updates:,}"]
    return [
        _near(run.path),
        run.state,
        *base,
        *figures,
        before,
        loss,
        *[clock(seconds(run))] * wide,
    ]


def _near(path: Path) -> str:
    """The path from here, if that is shorter."""
    relative = os.path.relpath(path)
    return min(str(path), relative, key=len)


def show_differences(screen: Screen, runs: Sequence[Run], apart: Sequence[Difference]) -> None:
    if not apart:
        screen.say("Nothing differs: options, base, rows, versions and results are the same.")
        return
    screen.table(["", *[_near(run.path) for run in runs]], [[d.what, *d.values] for d in apart])
