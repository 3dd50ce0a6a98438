"""mlxlora train."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mlxlora.config import RunConfig
from mlxlora.schema import toml_value
from mlxlora.verbs.flags import flags
from mlxlora.verbs.options import AsJson, Sets, Trust
from mlxlora.verbs.signals import stop_on_signal


@flags("lora.", "train.", "data.")
def train(
    overrides: list[str],
    recipe: Annotated[Path | None, typer.Argument(help="TOML file of options")] = None,
    model: Annotated[str, typer.Option("--model", help="base: a directory or a Hub id")] = "",
    data: Annotated[str, typer.Option("--data", help="JSONL file or directory")] = "",
    out: Annotated[str, typer.Option("--out", help="directory of the run, new")] = "",
    set: Sets = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train an adapter on your rows."""
    named = {"model": model, "data.path": data, "out": out}
    given = [f"{key}={toml_value(value)}" for key, value in named.items() if value]
    run = RunConfig.load(recipe, [*given, *overrides, *(set or [])])
    from mlxlora.base import load
    from mlxlora.console import Screen, TrainingDisplay
    from mlxlora.train.loop import check
    from mlxlora.train.loop import train as events

    check(run)
    screen = Screen(as_json)
    with stop_on_signal(screen.say) as stop:
        base = load(run.model, trust_remote_code=trust_remote_code)
        done = TrainingDisplay(screen).show(events(run, base, stop=stop))
    assert done is not None
    screen.result(dataclasses.asdict(done))
    if done.reason == "interrupted":
        screen.say(
            f"Interrupted after update {done.update}; its weights are in {done.last}.", "yellow"
        )
        if done.last != done.adapter:
            screen.say(f"The best by validation loss is from update {done.best_update}:", "yellow")
    _next_steps(screen, run, done.adapter)
    if done.reason == "interrupted":
        raise typer.Exit(3)


def _next_steps(screen: Any, run: RunConfig, adapter: str) -> None:
    named = ("--model", run.model, "--adapter", adapter)
    screen.command("mlxlora", "chat", *named)
    screen.command("mlxlora", "fuse", *named, "--out", "fused")
