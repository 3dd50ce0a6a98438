"""mlxlora completion, and the answers that a shell gets when Tab is pressed.

Typer writes the scripts and answers them; its own two options for that would stand in every
--help, so here it is a verb. Nothing is written into the user's files.
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import typer

ASKED = "_MLXLORA_COMPLETE"  # set by the scripts, for this program alone


def completion(
    shell: Annotated[Literal["zsh", "bash", "fish"], typer.Argument(help="which shell asks")],
    as_json: Annotated[bool, typer.Option("--json", help="the script in one JSON object")] = False,
) -> None:
    """Print what a shell needs to complete commands and options with Tab.

    zsh, a line in ~/.zshrc after compinit: eval "$(mlxlora completion zsh)"

    bash, a line in ~/.bashrc: eval "$(mlxlora completion bash)"

    fish: mlxlora completion fish > ~/.config/fish/completions/mlxlora.fish
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    script = get_completion_script(prog_name="mlxlora", complete_var=ASKED, shell=shell)
    print(json.dumps({"shell": shell, "script": script}) if as_json else script)


def beginnings(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """What Tab offers where one of these is wanted."""

    def offered(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return offered


def answer_shells() -> None:
    """If a shell asks for completions, let Typer know how shells want to be answered."""
    if ASKED in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
