"""Copying what fuse and export wrote to where another program looks for models."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlora.errors import ConfigError

if TYPE_CHECKING:
    from mlxlora.console import Screen

PROGRAMS = ("lmstudio",)

Install = Annotated[
    str | None,
    typer.Option(
        "--install",
        metavar="|".join(PROGRAMS),
        help="copy the model to where this program looks for models",
        show_default=False,
    ),
]


def check(program: str | None, model: Path) -> None:
    """Raise ConfigError for a program that is not known, ExportError if it has such a model."""
    if program is None:
        return
    if program not in PROGRAMS:
        raise ConfigError(f"--install {program!r} is not known; known is {', '.join(PROGRAMS)}")
    from mlxlora.export.lmstudio import place
    from mlxlora.files import refuse_existing

    refuse_existing(place(model))


def install(screen: "Screen", program: str | None, model: str | Path) -> dict[str, Any]:
    """Copy it there, or say where that is; what --json is to tell of it."""
    from mlxlora.export import lmstudio

    if program is None:
        with suppress(ConfigError, OSError):  # settings of another program that nobody asked for
            place = lmstudio.place(Path(model))
            screen.say(f"For LM Studio: --install lmstudio copies it to {place}", "dim")
        return {}
    there = lmstudio.install(Path(model))
    screen.say(f"copied for LM Studio: {there}")
    return {"installed": str(there)}
