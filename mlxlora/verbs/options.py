"""Options that several verbs share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError
from mlxlora.schema import options
from mlxlora.verbs.completion import beginnings

if TYPE_CHECKING:
    from mlxlora.lora.adapter import Adapter

Model = Annotated[str, typer.Option("--model", help="base model: a directory or a Hub id")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]DIR",
        help="adapter: directory or Hub id, by this name; repeatable",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="the result as JSON on the last line of stdout")
]
Force = Annotated[bool, typer.Option("--force", help="go on with an adapter of another base")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="any option, e.g. lora.rank=32; repeatable",
        autocompletion=beginnings([f"{key}=" for key, _, _ in options(RunConfig)]),
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="tensorboard|wandb|mlflow",
        help="tell a tracker of the run, too (each an extra to install); repeatable",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python that the model brings along")
]


def named_adapters(options: Sequence[str] | None) -> "dict[str, Adapter]":
    """The adapters that --adapter names, by their names or else their directories.

    Raises ConfigError for a name given twice.
    """
    import os

    from mlxlora.lora.adapter import Adapter

    found: dict[str, Adapter] = {}
    for option in options or ():
        name, told, path = option.partition("=")
        if not told or os.path.exists(option):
            name = path = option
        if name in found:
            raise ConfigError(f"--adapter: {name} is given twice; name them: --adapter NAME=DIR")
        found[name] = Adapter.load(path)
    return found
