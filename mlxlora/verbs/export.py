"""mlxlora export."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlora.errors import ConfigError, ExportError
from mlxlora.verbs.completion import beginnings
from mlxlora.verbs.fidelity import MaxKl, Measured, ProofRows, figures, proof, show
from mlxlora.verbs.formats import FORMATS, OF_ADAPTERS, Order, Outcome, check_adapter
from mlxlora.verbs.install import Install
from mlxlora.verbs.install import check as check_install
from mlxlora.verbs.install import install as copy
from mlxlora.verbs.options import AsJson, Force, Model, Trust
from mlxlora.verbs.signals import ending_cleanly

if TYPE_CHECKING:
    from mlxlora.base import Base
    from mlxlora.console import Screen
    from mlxlora.lora.adapter import Adapter

FOR_LM_STUDIO = ("mlx", "gguf")  # formats that it loads


def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="what is to be written; must not exist yet")],
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help=" or ".join(FORMATS),
            metavar="FORMAT",
            autocompletion=beginnings(FORMATS),
        ),
    ],
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", help="adapter: directory or Hub id", show_default=False),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant",
            help="type of the weights. gguf, ollama: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; "
            "hf: f32, f16, bf16; mlx: as fuse's --bits",
            show_default="gguf f16, ollama q8_0, hf the base's own",
        ),
    ] = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="ollama: the adapter as a file of its own")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="ask base + adapter, what was written and (where installed) the program it is for "
            "the same prompts: token ids first, then answers",
        ),
    ] = False,
    data: ProofRows = None,
    max_kl: MaxKl = None,
    measured: Measured = True,
    install: Install = None,
    force: Force = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a model or an adapter in another program's format."""
    from mlxlora.base import load
    from mlxlora.console import Screen
    from mlxlora.lora.adapter import Adapter
    from mlxlora.model_files import find

    if kind not in FORMATS:
        raise ConfigError(f"--format {kind!r} is not known; known are {', '.join(FORMATS)}")
    if keep_adapter and kind != "ollama":
        raise ConfigError(f"--keep-adapter is for --format ollama, not for {kind}")
    if install is not None and kind not in FOR_LM_STUDIO:
        raise ConfigError(f"--install is for --format {' or '.join(FOR_LM_STUDIO)}, not for {kind}")
    if kind in OF_ADAPTERS:
        check_adapter(adapter, quant)
    check_install(install, out)
    screen = Screen(as_json)
    order = Order(
        model=model,
        source=find(model)[0],
        adapter=Adapter.load(adapter) if adapter is not None else None,
        out=out,
        quant=quant,
        proof=proof(data, max_kl, measured, trust_remote_code, screen.progress),
        check=check,
        keep_adapter=keep_adapter,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=screen.progress,
    )
    with ending_cleanly():
        done = FORMATS[kind](order)
    for line in done.lines:
        screen.say(line)
    if done.fidelity is not None:
        show(screen, done.fidelity, "written")
    told = {"format": kind, **done.result, **figures(done.fidelity)}
    if check:  # the base is opened only now: until here nobody needs the memory it takes
        base = load(model, trust_remote_code=trust_remote_code)
        told["check"] = _checked(screen, base, order.adapter, done, force)
    wrong = [one["name"] for one in told.get("check", ()) if one["differing"]]
    if kind in FOR_LM_STUDIO and not wrong:
        told |= copy(screen, install, out)
    if done.command:
        screen.command(*done.command, indent="")
    screen.result(told)
    if wrong:
        raise ExportError(
            f"{out} was written, but {' and '.join(wrong)} cuts prompts into other tokens than the "
            "model was trained with; its answers will be worse than they should be"
        )


def _checked(
    screen: "Screen", base: "Base", adapter: "Adapter | None", done: Outcome, force: bool
) -> list[dict[str, Any]]:
    """Ask all who can be asked, show how they answered, and return it for --json."""
    from dataclasses import asdict

    from mlxlora.export.check import compare, prompts_for
    from mlxlora.export.speakers import InMLX, Speaker, installed
    from mlxlora.lora.attach import attach

    assert done.opened is not None  # formats of adapters refuse to be checked
    if adapter is not None:
        attach(base, adapter, force=force)
    opened, tokenizer = done.opened, base.tokenizer
    asked: list[Callable[[], Speaker]] = [
        lambda: InMLX("what was written, here", opened(), tokenizer)
    ]
    for packages, program in done.programs.items():
        if installed(*packages.split()):
            asked.append(partial(program, tokenizer.eos_token_ids))
        else:
            screen.say(f"not asked, for it is not installed: pip install {packages}", "dim")
    name = "base + adapter" if adapter is not None else "the base"
    first = InMLX(name, base.model, tokenizer)
    found = list(compare(first, asked, prompts_for(base, adapter)))
    screen.table(
        [f"compared with {first.name}", "same tokens", "same answers"],
        [
            [
                one.name,
                f"{one.same_prompts} of {one.prompts}",
                f"{one.same_answers} of {one.prompts}",
            ]
            for one in found
        ],
    )
    for one in found:
        for prompt in one.differing[:3]:
            screen.line(f"other tokens in {one.name}: {prompt!r}", "red")
        if one.example is not None:
            screen.line(f"{one.name}, the first answer that differs:", "dim")
            for text in one.example:
                screen.line(f"  {text!r}", "dim")
    return [asdict(one) for one in found]
