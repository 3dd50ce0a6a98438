"""mlxlora export: a table of formats."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mlxlora.errors import ConfigError
from mlxlora.verbs.options import AsJson, Force, Model, Trust


@dataclass(frozen=True)
class Order:
    """What is to be written, as the command line says it."""

    model: str
    adapter: str | None
    out: Path
    quant: str | None
    force: bool
    trust_remote_code: bool
    keep_adapter: bool = False


def peft(order: Order) -> tuple[list[str], dict[str, Any]]:
    """Returns (lines to show, the result)."""
    from mlxlora.base import open_base
    from mlxlora.export.peft import write
    from mlxlora.files import refuse_existing
    from mlxlora.lora.adapter import Adapter
    from mlxlora.lora.attach import check_base

    if order.adapter is None:
        raise ConfigError("--format peft writes an adapter; pass --adapter")
    if order.quant is not None:
        raise ConfigError("--format peft has no --quant: adapters are written in float32")
    refuse_existing(order.out)
    adapter = Adapter.load(order.adapter)
    base = open_base(order.model, trust_remote_code=order.trust_remote_code)
    if not order.force:
        check_base(base, adapter)
    done = write(adapter, base, order.out, beside=order.adapter)
    first = f"{done.path}: {done.modules} layers, rank {done.rank}, lora_alpha {done.alpha}"
    return [first, *done.notes], asdict(done)


def hf(order: Order) -> tuple[list[str], dict[str, Any]]:
    """Returns (lines to show, the result)."""
    from mlxlora.console import size
    from mlxlora.export.huggingface import write
    from mlxlora.files import refuse_existing
    from mlxlora.lora.adapter import Adapter

    refuse_existing(order.out)
    done = write(
        order.model,
        Adapter.load(order.adapter) if order.adapter is not None else None,
        order.out,
        order.quant,
        force=order.force,
        trust_remote_code=order.trust_remote_code,
    )
    first = f"{done.path}: {size(done.bytes)}, {done.tensors} tensors, {done.dtype}"
    return [first, *done.notes], asdict(done)


def gguf(order: Order) -> tuple[list[str], dict[str, Any]]:
    """Returns (lines to show, the result)."""
    from mlxlora.console import size
    from mlxlora.export.gguf import write
    from mlxlora.lora.adapter import Adapter

    done = write(
        order.model,
        Adapter.load(order.adapter) if order.adapter is not None else None,
        order.out,
        order.quant or "f16",
        force=order.force,
        trust_remote_code=order.trust_remote_code,
    )
    first = f"{done.path}: {size(done.bytes)}, {done.quant}, {done.tensors} tensors"
    return [first, *done.notes], asdict(done)


def gguf_lora(order: Order) -> tuple[list[str], dict[str, Any]]:
    """Returns (lines to show, the result)."""
    from mlxlora.console import size
    from mlxlora.export.gguf_lora import write
    from mlxlora.lora.adapter import Adapter

    if order.adapter is None:
        raise ConfigError("--format gguf-lora writes an adapter; pass --adapter")
    if order.quant is not None:
        raise ConfigError("--format gguf-lora has no --quant: adapters are written in float32")
    done = write(
        order.model,
        Adapter.load(order.adapter),
        order.out,
        force=order.force,
        trust_remote_code=order.trust_remote_code,
    )
    first = f"{done.path}: {size(done.bytes)}, {done.layers} layers, rank {done.rank}"
    return [first, *done.notes], asdict(done)


def ollama(order: Order) -> tuple[list[str], dict[str, Any]]:
    """Returns (lines to show, the result)."""
    from mlxlora.console import size
    from mlxlora.export.ollama import QUANT, write
    from mlxlora.lora.adapter import Adapter

    done = write(
        order.model,
        Adapter.load(order.adapter) if order.adapter is not None else None,
        order.out,
        order.quant or QUANT,
        keep_adapter=order.keep_adapter,
        force=order.force,
        trust_remote_code=order.trust_remote_code,
    )
    lines = [f"{done.path}: {size(done.bytes)}, {done.quant}"]
    if done.tried:
        share = f"{done.equal} of {done.tried} conversations"
        lines.append(f"the TEMPLATE renders {share} as the chat template does")
    return [*lines, *done.notes], asdict(done)


FORMATS: dict[str, Callable[[Order], tuple[list[str], dict[str, Any]]]] = {
    "hf": hf,
    "peft": peft,
    "gguf": gguf,
    "gguf-lora": gguf_lora,
    "ollama": ollama,
}


def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="what is to be written; must not exist yet")],
    kind: Annotated[str, typer.Option("--format", help=" or ".join(FORMATS), metavar="FORMAT")],
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="adapter directory", show_default=False)
    ] = None,
    quant: Annotated[
        str | None, typer.Option("--quant", help="type of the weights", show_default=False)
    ] = None,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="ollama: the adapter as a file of its own")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a model or an adapter in another program's format."""
    from mlxlora.console import Screen

    if kind not in FORMATS:
        raise ConfigError(f"--format {kind!r} is not known; known are {', '.join(FORMATS)}")
    if keep_adapter and kind != "ollama":
        raise ConfigError(f"--keep-adapter is for --format ollama, not for {kind}")
    order = Order(model, adapter, out, quant, force, trust_remote_code, keep_adapter)
    lines, result = FORMATS[kind](order)
    screen = Screen(as_json)
    for line in lines:
        screen.say(line)
    if "create" in result:  # how to go on
        screen.command(*result["create"], indent="")
    screen.result({"format": kind, **result})
