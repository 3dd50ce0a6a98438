"""mlxlora quantize."""

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.verbs.options import AsJson, Model, Trust
from mlxlora.verbs.signals import ending_cleanly


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="directory of the new model")],
    bits: Annotated[int, typer.Option("--bits", help="2, 3, 4, 5, 6 or 8")] = 4,
    group_size: Annotated[int, typer.Option(help="weights that share a scale")] = 64,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Make a quantized base."""
    from mlxlora.console import Screen, size
    from mlxlora.export.quantize import quantize as write

    screen = Screen(as_json)
    with ending_cleanly():
        count = write(model, out, bits, group_size, trust_remote_code=trust_remote_code)
    screen.say(f"{out}: {size(count)} at {bits} bits")
    screen.result({"path": str(out), "bytes": count, "bits": bits})
