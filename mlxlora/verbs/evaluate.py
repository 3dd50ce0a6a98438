"""mlxlora eval."""

import dataclasses
from typing import Annotated, Any

import typer

from mlxlora.config import RunConfig
from mlxlora.schema import toml_value
from mlxlora.verbs.flags import flags
from mlxlora.verbs.options import Adapters, AsJson, Force, Model, Sets, Trust, named_adapters


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
    max_tokens: Annotated[int, typer.Option(min=1, help="length of those answers")] = 256,
    rows: Annotated[int, typer.Option(min=0, help="only the first so many rows (0: all)")] = 0,
    set: Sets = None,
    force: Force = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Loss and perplexity per supervised token; exact match with --generate."""
    run = RunConfig.load(None, [f"data.path={toml_value(data)}", *overrides, *(set or [])])
    from mlxlora.base import load
    from mlxlora.console import Screen
    from mlxlora.evaluate import evaluate as results

    screen = Screen(as_json)
    base = load(model, trust_remote_code=trust_remote_code)
    named = list(named_adapters(adapter).items())
    found = list(
        results(
            base,
            run.data,
            named,
            with_base=with_base,
            generate=generate,
            max_tokens=max_tokens,
            limit=rows,
            force=force,
            progress=screen.progress,
        )
    )
    columns = ["model", "loss", "perplexity", "tokens", "rows", *["exact"] * generate]
    screen.table(columns, [_figures(result) for result in found])
    screen.result({"results": [_result_json(result) for result in found]})


def _figures(result: Any) -> list[str]:
    exact = [] if result.exact_match is None else [f"{result.exact_match:.1%}"]
    counts = [f"{result.tokens:,}", f"{result.rows:,}"]
    return [result.name, f"{result.loss:.4f}", f"{result.perplexity:.4g}", *counts, *exact]


def _result_json(result: Any) -> dict[str, Any]:
    value = dataclasses.asdict(result)
    value.pop("answers")
    return {k: v for k, v in value.items() if v is not None}
