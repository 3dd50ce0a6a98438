"""mlxlora eval."""

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.config import RunConfig
from mlxlora.readers import expanded
from mlxlora.schema import toml_value
from mlxlora.verbs.flags import flags
from mlxlora.verbs.options import Adapters, AsJson, Force, Model, Sets, Trust, named_adapters

WORST = 3  # rows of a model, when metrics are asked for


@flags("data.")
def evaluate(
    overrides: list[str],
    model: Model,
    data: Annotated[str, typer.Option("--data", help="JSONL file, or directory with test.jsonl")],
    adapter: Adapters = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="measure the base too")] = False,
    generate: Annotated[
        bool, typer.Option("--generate", help="answer each row and count exact matches")
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="answer each row and score: exact, contains, regex:PATTERN (with a group: what it "
            "last finds is what it last finds in the row's own answer), json, json:SCHEMA.json, "
            "chrf, python:FILE.py:FUNCTION (prompt, wanted, got) -> number; repeatable",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="length of those answers")] = 256,
    rows: Annotated[int, typer.Option(min=0, help="only the first so many rows (0: all)")] = 0,
    worst: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="show the rows on which each model is worst",
            show_default=f"{WORST} with metrics, else 0",
        ),
    ] = None,
    rows_out: Annotated[
        Path | None, typer.Option("--rows-out", help="write every row's results, JSONL")
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", help="write the result, JSON, as for the report")
    ] = None,
    set: Sets = None,
    force: Force = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Loss per supervised token, metrics of answers; which of several models is better."""
    run = RunConfig.load(None, [f"data.path={toml_value(data)}", *overrides, *(set or [])])
    from mlxlora.evaluation.metrics import metrics as asked_metrics
    from mlxlora.evaluation.rows import check_place, trained_on, worst_rows, write_rows

    metrics = asked_metrics([*["exact"] * generate, *(metric or [])])
    places = [(expanded(p), key) for p, key in ((rows_out, "models"), (save, "results")) if p]
    for place, key in places:
        check_place(place, key)
    from mlxlora.base import load
    from mlxlora.console import Screen
    from mlxlora.evaluation.evaluate import BASE, open_rows
    from mlxlora.evaluation.evaluate import evaluate as evaluated
    from mlxlora.evaluation.results import as_json as told
    from mlxlora.evaluation.results import compare
    from mlxlora.files import write_json
    from mlxlora.scores import show_comparisons, show_results, show_worst

    screen = Screen(as_json)
    base = load(model, trust_remote_code=trust_remote_code)
    named = list(named_adapters(adapter).items())
    measured = evaluated(
        base,
        run.data,
        named,
        with_base=with_base,
        metrics=metrics,
        max_tokens=max_tokens,
        limit=rows,
        force=force,
        progress=screen.progress,
    )
    results = list(measured)
    comparisons = compare(results)
    show_results(screen, results, metrics)
    show_comparisons(screen, results, comparisons)
    taken = open_rows(run.data, rows)
    for name in (name for name, one in named if trained_on(one, taken)):
        screen.say(
            f"note: {name} was trained on rows of this very file, so its figures flatter it; "
            "measure it on rows that it has not seen",
            "yellow",
        )
    count = worst if worst is not None else WORST * bool(metrics)
    for result in [r for r in results if r.name != BASE] or results:
        show_worst(screen, result, worst_rows(taken, results, result, count))
    found = told(model, str(taken.file.path), results, comparisons)
    for place, key in places:
        if key == "models":
            write_rows(place, taken, results)
        else:
            write_json(place, found)
        screen.say(f"\nwritten: {place}", "dim")
    screen.result(found)
