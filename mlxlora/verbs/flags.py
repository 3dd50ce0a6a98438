"""Options of the command line made from the config's fields: data.max_length -> --max-length."""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mlxlora.config import RunConfig
from mlxlora.schema import options
from mlxlora.verbs.completion import beginnings


def flags(*prefixes: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb an option for each config field that asks for one, e.g. --rank.

    The verb receives what was given as overrides: ["lora.rank=32"].
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        keys: dict[str, str] = {}
        parameters = [
            p for p in inspect.signature(verb).parameters.values() if p.name != "overrides"
        ]
        for key, kind, field in options(RunConfig):
            if field.metadata["flag"] and key.startswith(prefixes):
                keys[field.name] = key
                parameters.append(_flag(field, kind))

        @functools.wraps(verb)
        def wrapped(**given: Any) -> None:
            values = {name: given.pop(name) for name in keys}
            given["overrides"] = [f"{keys[n]}={v}" for n, v in values.items() if v is not None]
            verb(**given)

        del wrapped.__wrapped__  # type: ignore[attr-defined]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return decorate


def _flag(field: Any, kind: Any) -> inspect.Parameter:
    """One option of the command line, described by its config field."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    said = f"{field.metadata['unit']}, default {default}".removeprefix(", ")
    option = typer.Option(
        "--" + field.name.replace("_", "-"),
        help=f"{field.metadata['help']} ({said})",
        metavar="|".join(choices) or None,
        show_default=False,
        rich_help_panel="The run (other options: --set KEY=VALUE)",
        autocompletion=beginnings(choices) if choices else None,
    )
    plain: Any = kind if kind in (int, float) else str
    annotation: Any = Annotated[plain | None, option]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
