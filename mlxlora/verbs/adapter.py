"""mlxlora adapter: info, verify."""

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.verbs.options import AsJson, Model, Trust


def info(
    path: Annotated[Path, typer.Argument(metavar="A", help="adapter directory")],
    as_json: AsJson = False,
) -> None:
    """What an adapter is and what it was trained on."""
    from mlxlora.console import Screen
    from mlxlora.lora.adapter import Adapter
    from mlxlora.lora.card import facts

    adapter = Adapter.load(path)
    screen = Screen(as_json)
    screen.facts(facts(adapter))
    screen.result({**adapter.config(), "provenance": adapter.provenance})


def verify(
    path: Annotated[Path, typer.Argument(metavar="A", help="adapter directory")],
    model: Model,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Check an adapter's hash, and that this base is the one it was trained on."""
    from mlxlora.base import load
    from mlxlora.console import Screen
    from mlxlora.lora.adapter import Adapter
    from mlxlora.lora.attach import attach

    adapter = Adapter.load(path)
    base = load(model, trust_remote_code=trust_remote_code)
    attach(base, adapter)
    screen = Screen(as_json)
    screen.say(f"{path}: weights whole, base the same, {len(adapter.modules)} layers fit")
    screen.result({"ok": True, "modules": len(adapter.modules)})
