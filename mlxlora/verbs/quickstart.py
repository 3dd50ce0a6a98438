"""mlxlora quickstart."""

from pathlib import Path
from typing import Annotated

import typer

from mlxlora.verbs.options import AsJson


def quickstart(
    dir: Annotated[Path, typer.Option("--dir", help="where to write")] = Path("quickstart"),
    as_json: AsJson = False,
) -> None:
    """See the whole story in about a minute, offline, on the bundled tiny base."""
    from mlxlora.quickstart.show import show

    show(dir, as_json)
