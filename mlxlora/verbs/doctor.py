"""mlxlora doctor."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mlxlora.verbs.options import AsJson


def doctor(
    out: Annotated[
        Path, typer.Option("--out", help="where runs would go", show_default="here")
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """What this machine offers and what is missing, each with its remedy."""
    from mlxlora.console import Screen
    from mlxlora.doctor import examine

    screen = Screen(as_json)
    checks = []
    for check in examine(out):
        screen.check(check.state, check.name, check.found, check.remedy)
        checks.append(check)
    states = [check.state for check in checks]
    ok = "fail" not in states
    if ok:
        warnings = states.count("warn")
        screen.say(f"\nReady to train; {warnings or 'no'} warning{'s' * (warnings != 1)}.")
    else:
        screen.say(f"\n{states.count('fail')} to mend before training.", "bold red")
    screen.result({"checks": [dataclasses.asdict(check) for check in checks], "ok": ok})
    if not ok:
        raise typer.Exit(2)
