"""mlxlora fuse."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.verbs.fidelity import MaxKl, Measured, ProofRows, figures, proof, show
from mlxlora.verbs.install import Install, check
from mlxlora.verbs.install import install as copy
from mlxlora.verbs.options import AsJson, Force, Model, Trust
from mlxlora.verbs.signals import ending_cleanly

if TYPE_CHECKING:
    from mlxlora.export.fuse import Fused


def fuse(
    model: Model,
    adapter: Annotated[str, typer.Option("--adapter", help="adapter: directory or Hub id")],
    out: Annotated[Path, typer.Option("--out", help="directory of the new model")],
    bits: Annotated[
        str,
        typer.Option(
            "--bits",
            metavar="auto|keep|none|4|5|6|8",
            help="of the layers that were trained, over a quantized base: chosen for each by "
            "measurement, like the base, unquantized (the whole model), or a number",
        ),
    ] = "auto",
    max_size: Annotated[
        float | None,
        typer.Option(
            "--max-size",
            min=1,
            help="with --bits auto: of the weights on disk, times the base's",
            show_default="1.15",
        ),
    ] = None,
    data: ProofRows = None,
    max_kl: MaxKl = None,
    measured: Measured = True,
    install: Install = None,
    force: Force = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write base + adapter as one model that mlx-lm loads."""
    from mlxlora.console import Screen
    from mlxlora.export.fuse import fuse as write
    from mlxlora.export.fuse import wished
    from mlxlora.lora.adapter import Adapter

    wish = wished(bits, "--bits")
    check(install, out)
    screen = Screen(as_json)
    with ending_cleanly():
        done = write(
            model,
            Adapter.load(adapter),
            out,
            wish,
            max_size=max_size,
            progress=screen.progress,
            proof=proof(data, max_kl, measured, trust_remote_code, screen.progress),
            force=force,
            trust_remote_code=trust_remote_code,
        )
    for line in told(done):
        screen.say(line)
    if done.fidelity is not None:
        show(screen, done.fidelity, "fused")
    there = copy(screen, install, done.path)
    own = {name: value for name, value in asdict(done).items() if name != "fidelity"}
    screen.result({**own, **figures(done.fidelity), **there})


def told(done: "Fused") -> list[str]:
    """What was written, in lines."""
    from mlxlora.console import size

    what = f"{done.layers} layers fused" if done.layers else "all weights replaced"
    first = f"{done.path}: {size(done.bytes)} ({done.times:.2f} times the base), {what}"
    return [first, f"Their weights: {done.bits}"]
