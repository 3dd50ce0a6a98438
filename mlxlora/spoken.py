"""An answer in the terminal as it is spoken: Markdown, block by block.

A block that is complete is printed once and scrolls away like any text; only the last one is
drawn again as it grows, so nothing flickers however long the answer. In a pipe the text goes
out as it is.
"""

from collections.abc import Iterator

from rich.live import Live
from rich.markdown import Markdown
from rich.padding import Padding

from mlxlora.console import Screen
from mlxlora.errors import printable

FENCES = ("```", "~~~")
REFRESHES = 12  # a second


def speak(screen: Screen, pieces: Iterator[str]) -> str:
    """Show the pieces as they come; returns them joined."""
    if not screen.console.is_terminal:
        return screen.stream(pieces)
    console = screen.console
    text, shown = "", 0  # shown: characters that are printed for good
    try:
        with Live(console=console, transient=True, refresh_per_second=REFRESHES) as live:
            for piece in pieces:
                text += piece
                done = complete(text, shown)
                if done > shown:
                    console.print(_drawn(text[shown:done]))
                    shown = done
                live.update(_drawn(text[shown:]))
    finally:  # an answer that is stopped keeps what it has said
        if text[shown:].strip():
            console.print(_drawn(text[shown:]))
    return text


def complete(text: str, start: int) -> int:
    """Where the last blank line is, from start on, that ends a block: not within fenced code."""
    end, fence, at = start, "", start
    for line in text[start:].splitlines(keepends=True):
        at += len(line)
        word = line.strip()
        if fence:
            if word.startswith(fence):
                fence = ""
        elif word.startswith(FENCES):
            fence = word[:3]
        elif not word and line.endswith("\n"):
            end = at
    return end


def _drawn(text: str) -> Padding:
    return Padding(Markdown(printable(text), code_theme="ansi_dark"), (0, 0, 1, 0))
