"""A picture of the terminal while the program runs: what really stood there, as SVG.

    python recipes/picture.py recipes/pictures/train.svg
    python recipes/picture.py OUT.svg --until "update 200" --width 100 -- mlxlora ...

The command runs in tmux, in a terminal of its own. When the text of --until stands on the screen
(a regular expression; by default at the end), the screen is drawn by rich. Nothing is retouched.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "mlxlora" / "quickstart"
ENDED = "picture.py: ended"
# Long enough that there is a curve to see, on what every clone has.
TRAIN = [
    *("mlxlora", "train", str(BUNDLED / "recipe.toml"), "--model", str(BUNDLED / "base")),
    *("--data", str(BUNDLED / "data"), "--out", "runs/commands", "--set", "eval.every=25"),
    *("--set", 'eval.prompts=["Set a timer for nine minutes"]'),
]
HALF_WAY = r"\b1[5-9]\d\s*(?:/|of)\s*300"  # updates, as the display counts them


def screen(command: list[str], until: str, width: int, height: int, limit: float) -> str:
    """The screen, with its colours as escape sequences, once the text stands on it."""
    with tempfile.TemporaryDirectory() as place:
        # A socket of its own: no other session is touched, and none is left behind.
        tmux = ["tmux", "-S", f"{place}/tmux", "-f", "/dev/null"]
        line = f"{shlex.join(command)}; printf '\\n{ENDED}'; sleep {limit}"
        size = ["-x", str(width), "-y", str(height)]
        colours = ["-e", "TERM=xterm-256color", "-e", "COLORTERM=truecolor"]
        subprocess.run([*tmux, "new", "-d", *size, *colours, "-c", place, line], check=True)
        try:
            for _ in range(int(limit * 5)):
                shown = _captured([*tmux, "capture-pane", "-p"])
                if re.search(until, shown):
                    return _captured([*tmux, "capture-pane", "-ep"])
                if ENDED in shown:
                    raise SystemExit(f"it ended without showing {until!r}:\n{shown}")
                time.sleep(0.2)
        finally:
            subprocess.run([*tmux, "kill-server"], check=False)
    raise SystemExit(f"{until!r} was not seen within {limit} s")


def _captured(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def draw(ansi: str, title: str, width: int) -> str:
    """What stood on a screen, as SVG."""
    # In one piece: a colour goes on over the ends of lines.
    shown = Text.from_ansi(ansi.replace(ENDED, "").rstrip())
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=width, file=nowhere, color_system="truecolor")
        console.print(shown, no_wrap=True, crop=True)
    # A fixed id: the same screen gives the same file. The reader's own font: nothing is fetched.
    drawn = console.export_svg(title=title, unique_id="mlxlora")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


def main(words: list[str]) -> None:
    """Run, look, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--until", default="")
    parser.add_argument("--width", type=int, default=88)
    parser.add_argument("--height", type=int, default=40)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds")
    own, _, command = (words, "", []) if "--" not in words else _split(words)
    given = parser.parse_args(own)
    until = given.until or (ENDED if command else HALF_WAY)
    shown = screen(command or TRAIN, until, given.width, given.height, given.limit)
    title = shlex.join(command) if command else "mlxlora train"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(draw(shown, title, given.width), encoding="utf-8")


def _split(words: list[str]) -> tuple[list[str], str, list[str]]:
    place = words.index("--")
    return words[:place], "--", words[place + 1 :]


if __name__ == "__main__":
    main(sys.argv[1:])
