"""Options that several verbs share."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", help="base model: a directory or a Hub id")]
AsJson = Annotated[
    bool, typer.Option("--json", help="the result as JSON on the last line of stdout")
]
Force = Annotated[bool, typer.Option("--force", help="go on with an adapter of another base")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="any option, e.g. lora.rank=32; repeatable"),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python that the model brings along")
]
