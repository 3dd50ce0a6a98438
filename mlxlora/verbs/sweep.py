"""mlxlora sweep."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError
from mlxlora.readers import expanded
from mlxlora.schema import toml_value
from mlxlora.verbs.flags import flags
from mlxlora.verbs.options import AsJson, Sets, Trust

if TYPE_CHECKING:
    from mlxlora.sweep.loop import News, Plan


@flags("lora.", "train.", "data.")
def sweep(
    overrides: list[str],
    recipe: Annotated[Path | None, typer.Argument(help="TOML file of options")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", metavar="KEY=A,B", help="values to try, e.g. lora.rank=8,16; repeatable"
        ),
    ] = None,
    model: Annotated[str, typer.Option("--model", help="base: a directory or a Hub id")] = "",
    data: Annotated[str, typer.Option("--data", help="JSONL file or directory")] = "",
    out: Annotated[
        str, typer.Option("--out", help="directory of the sweep: new, or one to go on with")
    ] = "",
    keep: Annotated[
        float, typer.Option("--keep", help="share of the variants that goes on at a rung")
    ] = 0.5,
    rungs: Annotated[
        int | None,
        typer.Option(
            "--rungs",
            min=0,
            help="how often the worse variants are dropped",
            show_default="until about one is left",
        ),
    ] = None,
    no_halving: Annotated[
        bool, typer.Option("--no-halving", help="train all of them to the end")
    ] = False,
    set: Sets = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Try every combination of some options; drop the hopeless early. The same command goes on."""
    if no_halving and rungs:
        raise ConfigError("--no-halving is --rungs 0; give one of them")
    from mlxlora.sweep.grid import read_grid, variants
    from mlxlora.sweep.halving import rungs as shares
    from mlxlora.sweep.loop import Plan
    from mlxlora.sweep.loop import sweep as news

    values = read_grid(grid or [])
    named = {"model": model, "data.path": data, "out": out}
    given = [f"{key}={toml_value(value)}" for key, value in named.items() if value]
    given += [*overrides, *(set or [])]
    if twice := [key for key in values if any(text.startswith(f"{key}=") for text in given)]:
        raise ConfigError(f"{', '.join(twice)}: given alone and in --grid; leave one of them out")
    run = RunConfig.load(recipe, given)
    if not run.out:
        raise ConfigError("not given: out, the directory of the sweep")
    place = expanded(run.out)
    found = variants(recipe, given, values, place)
    plan = Plan(
        place,
        str(recipe or ""),
        run,
        values,
        found,
        keep,
        shares(len(found), keep, 0 if no_halving else rungs),
    )
    _follow(plan, lambda stop: news(plan, stop=stop, trust_remote_code=trust_remote_code), as_json)


def _follow(
    plan: "Plan", events: Callable[[threading.Event], Iterator["News"]], as_json: bool
) -> None:
    """Show a sweep to its end, then what to do next. Exits with 3 if it can go on."""
    from mlxlora.console import Screen
    from mlxlora.leaderboard import Leaderboard
    from mlxlora.sweep.board import SWEEP
    from mlxlora.verbs.running import stop_on_signal

    screen, again = Screen(as_json), ("mlxlora", *sys.argv[1:])
    board = Leaderboard(screen)
    screen.say(_said(plan))
    begun = (plan.directory / SWEEP).exists
    try:
        with stop_on_signal(screen.say, begun) as stop:
            last = board.show(events(stop))
    except KeyboardInterrupt:
        if not begun():
            screen.say("Interrupted before the sweep began; nothing was written.")
            raise typer.Exit(130) from None
        screen.say("Stopped at once. To go on from the last checkpoint, the same command:")
        screen.command(*again)
        raise typer.Exit(3) from None
    except OSError:
        if begun():
            screen.say("When that is mended, the sweep goes on with:")
            screen.command(*again)
        raise
    assert last is not None
    board.table(last.board)
    best = last.board.best
    place = plan.directory / best.run if best else plan.directory
    screen.result(
        {**last.board.to_dict(), "end": last.end}
        | ({"best": best.name, "adapter": str(place / "adapter")} if best else {})
    )
    if last.end == "interrupted":
        screen.say("\nInterrupted. To go on as if nothing had happened:", "yellow")
        screen.command(*again)
        raise typer.Exit(3)
    assert best is not None
    screen.say(f"\nbest: {best.name}, validation loss {best.loss:.4f}", "bold green")
    model = ("--model", plan.config.model, "--adapter", place / "adapter")
    screen.command("mlxlora", "chat", *model)
    screen.command("mlxlora", "fuse", *model, "--out", "fused")
    screen.say("the same options on other rows, or for longer:", "dim")
    screen.command("mlxlora", "train", place / "run.toml", "--data", "DATA", "--out", "RUN")


def _said(plan: "Plan") -> str:
    count = len(plan.variants)
    if not plan.rungs:
        return f"{count} variants, each trained to the end"
    shares = ", ".join(f"{100 * share:.3g} %" for share in plan.rungs)
    kept = f"{100 * plan.keep:.3g} %"
    return f"{count} variants; after {shares} of a run the better {kept} go on"
