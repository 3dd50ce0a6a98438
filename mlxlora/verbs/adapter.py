"""mlxlora adapter: info, verify, import."""

import dataclasses
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
    """Recompute an adapter's hash; check that this base, tokenizer and template are its own."""
    from mlxlora.base import load
    from mlxlora.console import Screen
    from mlxlora.errors import AdapterError
    from mlxlora.lora.adapter import Adapter
    from mlxlora.lora.verify import DIFFERS, SAME, UNKNOWN, verify

    adapter = Adapter.load(path)
    checks = verify(adapter, load(model, trust_remote_code=trust_remote_code))
    wrong = [check.what for check in checks if check.found == DIFFERS]
    screen = Screen(as_json)
    states = {SAME: "pass", UNKNOWN: "warn", DIFFERS: "fail"}
    for check in checks:
        screen.check(states[check.found], check.what, check.detail, "")
    screen.result({"ok": not wrong, "checks": [dataclasses.asdict(check) for check in checks]})
    if wrong:
        name = (adapter.provenance.get("base") or {}).get("name") or "its own base"
        raise AdapterError(f"not the base of this adapter ({', '.join(wrong)}). Use {name}.")


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
    from mlxlora.lora.card import facts
    from mlxlora.lora.peft import read

    refuse_existing(out)
    adapter = read(path, open_base(model, trust_remote_code=trust_remote_code))
    adapter.save(out)
    screen = Screen(as_json)
    screen.facts(facts(adapter))
    screen.say(f"{out}: {len(adapter.modules)} layers")
    screen.result({"path": str(out), **adapter.config(), "provenance": adapter.provenance})
