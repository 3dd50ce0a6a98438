"""mlxlora adapter: info, verify, import."""

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

    adapter = Adapter.load(path)
    screen = Screen(as_json)
    screen.facts(adapter.facts())
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


def import_(
    path: Annotated[Path, typer.Argument(metavar="PEFT_DIR", help="adapter made by PEFT")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="adapter directory to write")],
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Make an adapter of one that PEFT, Unsloth, axolotl or TRL wrote."""
    from mlxlora.base import open_base
    from mlxlora.console import Screen
    from mlxlora.files import refuse_existing
    from mlxlora.lora.peft import read

    refuse_existing(out)
    adapter = read(path, open_base(model, trust_remote_code=trust_remote_code))
    adapter.save(out)
    screen = Screen(as_json)
    screen.facts(adapter.facts())
    screen.say(f"{out}: {len(adapter.modules)} layers")
    screen.result({"path": str(out), **adapter.config(), "provenance": adapter.provenance})
