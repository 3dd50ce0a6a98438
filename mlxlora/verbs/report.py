"""mlxlora report."""

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.readers import expanded
from mlxlora.verbs.options import AsJson


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="directory of a run, of several, or of a sweep")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="file of the page", show_default="report.html in RUN"),
    ] = None,
    eval_: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="what eval --save wrote; repeatable"),
    ] = None,
    fused: Annotated[
        Path | None, typer.Option("--fused", metavar="DIR", help="the fused model, its figures")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A run as one HTML page: curves, answers, rows, options, figures. Of several, side by side."""
    from mlxlora.console import Screen
    from mlxlora.report.write import write_report

    screen = Screen(as_json)
    written = write_report(
        expanded(run),
        expanded(out) if out is not None else None,
        [expanded(path) for path in eval_ or ()],
        expanded(fused) if fused is not None else None,
    )
    screen.say(f"{written.path}: {written.what}")
    screen.result({"report": str(written.path), "runs": written.runs})
