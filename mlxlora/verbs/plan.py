"""mlxlora plan."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError
from mlxlora.schema import toml_value
from mlxlora.verbs.flags import flags
from mlxlora.verbs.options import AsJson, Sets, Trust

if TYPE_CHECKING:
    from mlxlora.train.forecast import Change, Forecast

PARTS = {
    "base": "base weights",
    "adapter": "trained weights, gradients, optimizer",
    "activations": "activations for the backward pass",
    "working": "attention, logits, temporary arrays",
    "cache": "cache of freed arrays",
}


@flags("lora.", "train.", "data.")
def plan(
    overrides: list[str],
    recipe: Annotated[Path | None, typer.Argument(help="TOML file of options")] = None,
    model: Annotated[str, typer.Option("--model", help="base: a directory or a Hub id")] = "",
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="JSONL file or directory",
            show_default="rows of --max-length",
        ),
    ] = "",
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="what training may take, e.g. 12GB or 512MiB",
            show_default="what this machine offers",
        ),
    ] = "",
    set: Sets = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Will it fit, and how long: without loading the weights."""
    named = {"model": model, "data.path": data}
    given = [f"{key}={toml_value(value)}" for key, value in named.items() if value]
    run = RunConfig.load(recipe, [*given, *overrides, *(set or [])])
    if not run.model:
        raise ConfigError("not given: model (--model: a directory or a Hub id)")
    from mlxlora.console import Screen
    from mlxlora.memory import parse_size
    from mlxlora.train.forecast import forecast

    budget = parse_size(memory, "--memory") if memory else None
    screen = Screen(as_json)
    found = forecast(run, budget, trust_remote_code=trust_remote_code)
    _show(screen, found, "--memory" if memory else "this machine")
    screen.result(_result(found))


def _show(screen: Any, found: "Forecast", who: str) -> None:
    from mlxlora.console import clock, size

    needed = found.peak + found.cache
    offer = f"the {size(found.budget)} that {who} offers"
    if found.fits:
        screen.say(f"It fits: {size(needed)} of {offer}.", "bold green")
    else:
        screen.say(f"It does not fit: {size(needed)}, and not {offer}.", "bold yellow")
    sizes = {**found.parts, "cache": found.cache}
    rows = [(PARTS[name], size(value), f"{value / needed:.0%}") for name, value in sizes.items()]
    screen.say()
    screen.table(["memory", "bytes", "share"], [*rows, ("in all", size(needed), "")])
    screen.say()
    tokens = f"about {found.tokens_per_microbatch:,} tokens at once"
    how = "rows packed" if found.packed else "rows of like length padded"
    again = "; blocks computed again in the backward pass" if found.checkpoint_blocks else ""
    facts = [("computed", f"{tokens}, {how}{again}")]
    facts.append(("an update", f"about {seconds(found.seconds_per_update)}"))
    if found.updates:
        whole = clock(found.seconds)
        facts.append(("the run", f"about {whole} for {found.updates:,} updates, on this machine"))
    screen.facts(facts)
    for note in found.notes:
        screen.say(f"note: {note}", "yellow")
    if found.changes:
        screen.heading("What would change that")
        for number, change in enumerate(found.changes, 1):
            enough = ", enough alone" if change.fits else ""
            screen.say(f"{number}. {change.what}: saves {size(change.saves)}{enough}")
            screen.command(*shlex.split(change.option))


def seconds(value: float) -> str:
    from mlxlora.console import clock

    return clock(value) if value >= 10 else f"{value:.2g} s"


def _result(found: "Forecast") -> dict[str, Any]:
    return {
        "fits": found.fits,
        "budget": found.budget,
        "peak": found.peak,
        "parts": {**found.parts, "cache": found.cache},
        "tokens_per_microbatch": found.tokens_per_microbatch,
        "checkpoint_blocks": found.checkpoint_blocks,
        "packed": found.packed,
        "updates": found.updates,
        "seconds_per_update": found.seconds_per_update,
        "seconds": found.seconds if found.updates else None,
        "changes": [_change(change) for change in found.changes],
        "notes": list(found.notes),
    }


def _change(change: "Change") -> dict[str, Any]:
    return {
        "change": change.what,
        "option": change.option,
        "saves": change.saves,
        "fits": change.fits,
    }
