"""mlxlora resume."""

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.readers import expanded
from mlxlora.verbs.options import AsJson, Track, Trust
from mlxlora.verbs.running import Supervise, follow, supervised


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="directory of the run")],
    smaller: Annotated[
        bool,
        typer.Option(
            "--smaller",
            help="from now on compute each update in pieces of half as many tokens: less memory, "
            "the same updates but for rounding and what dropout draws",
        ),
    ] = False,
    track: Track = None,
    supervise: Supervise = None,
    because: Annotated[str, typer.Option(hidden=True)] = "",
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Go on with an interrupted run as if nothing had happened."""
    run = expanded(run)
    supervised(supervise, run, as_json, trust_remote_code, track or ())
    from mlxlora.train.directory import read
    from mlxlora.train.loop import resume as events

    config, _ = read(run)
    follow(
        lambda stop: events(
            run,
            stop=stop,
            smaller=smaller,
            because=because,
            trust_remote_code=trust_remote_code,
        ),
        config.model,
        run,
        as_json,
        track or (),
    )
