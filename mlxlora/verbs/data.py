"""mlxlora data."""

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError
from mlxlora.schema import toml_value
from mlxlora.verbs.flags import flags
from mlxlora.verbs.options import AsJson, Model, Sets, Trust


@flags("data.")
def data(
    overrides: list[str],
    data: Annotated[str, typer.Argument(help="JSONL file, or directory with train.jsonl")],
    model: Model,
    rows: Annotated[int, typer.Option(min=0, help="show so many, as the model sees them")] = 3,
    every: Annotated[
        bool, typer.Option("--all", help="count the tokens of every row, not of 20,000 of them")
    ] = False,
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix",
            metavar="OUT",
            help="write a copy without bad lines, exact copies, rows that train nothing, and rows "
            "of train that are held out too (counts every row)",
        ),
    ] = None,
    drop_near: Annotated[
        bool, typer.Option("--drop-near", help="with --fix: without near copies, too")
    ] = False,
    set: Sets = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """What will be trained: rows as the model sees them, lengths, copies, faults. --fix mends."""
    if drop_near and fix is None:
        raise ConfigError("--drop-near says what --fix leaves out; pass --fix OUT")
    named = [f"model={toml_value(model)}", f"data.path={toml_value(data)}"]
    run = RunConfig.load(None, [*named, *overrides, *(set or [])])
    from mlxlora.console import Screen
    from mlxlora.data.inspect.clean import check_target, clean
    from mlxlora.data.inspect.summary import inspect
    from mlxlora.show_data import show_cleaned, show_inspection
    from mlxlora.skeleton import open_skeleton

    if fix is not None:
        check_target(fix, Path(data).expanduser())
    screen = Screen(as_json)
    tokenizer = open_skeleton(model, trust_remote_code=trust_remote_code).tokenizer(
        trust_remote_code
    )
    found = inspect(
        run.data,
        tokenizer,
        seed=run.train.seed,
        rows=rows,
        every=every or fix is not None,
        progress=screen.bar,
    )
    show_inspection(screen, found)
    result = found.to_dict()
    if fix is not None:
        cleaned = clean(found, fix, drop_near)
        show_cleaned(screen, cleaned)
        screen.command("mlxlora", "data", fix, "--model", model)
        result["fixed"] = cleaned.to_dict()
    screen.result(result)
    if fix is None and not result["ready"]:
        raise typer.Exit(2)
