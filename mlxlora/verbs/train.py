"""mlxlora train."""

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.config import RunConfig
from mlxlora.readers import expanded
from mlxlora.schema import toml_value
from mlxlora.verbs.flags import flags
from mlxlora.verbs.options import AsJson, Sets, Track, Trust
from mlxlora.verbs.running import Supervise, follow, supervised


@flags("lora.", "train.", "data.")
def train(
    overrides: list[str],
    recipe: Annotated[Path | None, typer.Argument(help="TOML file of options")] = None,
    model: Annotated[str, typer.Option("--model", help="base: a directory or a Hub id")] = "",
    data: Annotated[str, typer.Option("--data", help="JSONL file or directory")] = "",
    out: Annotated[str, typer.Option("--out", help="directory of the run, new")] = "",
    set: Sets = None,
    track: Track = None,
    supervise: Supervise = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train an adapter on your rows."""
    named = {"model": model, "data.path": data, "out": out}
    given = [f"{key}={toml_value(value)}" for key, value in named.items() if value]
    run = RunConfig.load(recipe, [*given, *overrides, *(set or [])])
    place = expanded(run.out)
    if run.out:
        supervised(supervise, place, as_json, trust_remote_code, track or ())
    from mlxlora.train.loop import check
    from mlxlora.train.loop import train as events

    check(run)
    follow(
        lambda stop: events(run, stop=stop, trust_remote_code=trust_remote_code),
        run.model,
        place,
        as_json,
        track or (),
    )
