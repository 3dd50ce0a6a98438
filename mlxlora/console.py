"""What a person sees in the terminal: text, tables, figures; a run that goes is in display.py.

Results go to stdout and, with --json, progress goes to stderr, so that the last line of
stdout is one JSON object. Where the output is no terminal, lines are plain and few.
"""

import contextlib
import errno
import json
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlxlora.errors import printable
from mlxlora.files import finite


class Screen:
    """Where text goes: stdout, or stderr when stdout is kept for --json."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._console = Console(stderr=as_json, highlight=False, soft_wrap=False)
        self._counter: Live | None = None
        self._bar = ("", 0.0)  # what it shows, and since when

    @property
    def console(self) -> Console:
        """The console, with the transient line of progress taken away first."""
        if self._counter is not None:
            self._counter.stop()
            self._counter = None
        return self._console

    @contextlib.contextmanager
    def unless_gone(self) -> Iterator[None]:
        """Inside, a terminal or pipe that is gone fails nothing; from then on nothing is shown."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            self._let_go()

    def _let_go(self) -> None:
        self._console.quiet = True
        with contextlib.suppress(OSError, ValueError):  # no real file, as in a test
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._console.file.fileno())
            os.close(nowhere)

    def say(self, text: str = "", style: str = "") -> None:
        with self.unless_gone():
            self.console.print(Text(printable(text), style))

    def line(self, text: str, style: str = "") -> None:
        """One line of the screen, its end cut off if need be; line ends are shown as such."""
        shown = Text(printable(text).replace("\n", "⏎"), style)
        self.console.print(shown, no_wrap=True, overflow="ellipsis")

    def command(self, *words: object, indent: str = "  ") -> None:
        """A command to copy: one line however long, quoted for the shell."""
        line = Text(indent + shlex.join(str(word) for word in words), "cyan")
        self.console.print(line, soft_wrap=True)

    def heading(self, text: str) -> None:
        self.console.print()
        self.console.print(Text(text, "bold cyan"))

    def result(self, value: Any) -> None:
        """The machine-readable result, only with --json: one object, one line."""
        if self.as_json:
            value = finite(value)
            text = json.dumps(value, ensure_ascii=False, default=str)
            if any("\ud800" <= c <= "\udfff" for c in text):  # of a file's name that is not UTF-8
                text = json.dumps(value, default=str)
            print(text, flush=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Left-aligned first column, figures right-aligned."""
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        self.console.print(table)

    def facts(self, rows: Iterable[tuple[str, str]]) -> None:
        """Label and value, a line each; long values wrap under themselves."""
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in rows:
            table.add_row(escape(printable(label)), escape(printable(value)))
        self.console.print(table)

    def check(self, state: str, name: str, found: str, remedy: str) -> None:
        """One line of `doctor`: its state in colour, and under it what to do."""
        style = {"pass": "green", "warn": "yellow", "fail": "bold red"}[state]
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=4)
        table.add_column(width=9, style="dim")
        table.add_column(overflow="fold")
        table.add_row(Text(state, style), name, escape(printable(found)))
        if remedy:
            table.add_row("", "", Text(f"→ {printable(remedy)}", style))
        self.console.print(table)

    def stream(self, pieces: Iterator[str]) -> str:
        """Print pieces as they come; return them joined."""
        text = ""
        for piece in pieces:
            # Not by rich, which would replace tabs and :smileys:.
            self.console.file.write(printable(piece))
            self.console.file.flush()
            text += piece
        self.console.print()
        return text

    def ask(self, prompt: str) -> str:
        return self.console.input(f"[bold cyan]{escape(prompt)}[/]")

    def progress(self, what: str, done: int, of: int | None) -> None:
        """A transient line, gone as soon as anything else is shown; nothing in a pipe.

        of: None if nobody knows how many there will be.
        """
        self._transient(Text(f"{what}  {done}" + (f"/{of}" if of is not None else ""), "dim"))

    def bar(self, what: str, done: int, of: int) -> None:
        """progress() with a bar, for bytes and rows by the million."""
        if what != self._bar[0]:
            self._bar = (what, time.monotonic())
        line = Table.grid(padding=(0, 2, 0, 0))
        elapsed, share = time.monotonic() - self._bar[1], done / max(1, of)
        left = f"{clock(elapsed / share - elapsed)} left" if share and elapsed > 2 else ""
        line.add_row(
            ProgressBar(total=max(1, of), completed=done, width=30),
            Text(f"{share:.0%}", "bold"),
            Text(what),
            Text(left, "dim"),
        )
        self._transient(line)

    def _transient(self, shown: RenderableType) -> None:
        if not self._console.is_terminal:
            return
        if self._counter is None:
            self._counter = Live(console=self._console, transient=True, refresh_per_second=8)
            self._counter.start()
        self._counter.update(shown)


def fail(message: str) -> None:
    """The one message of an error, on stderr."""
    first, _, rest = message.partition("\n")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text("error: ", "bold red").append(first, "default"))
    if rest:
        console.print(Text(rest))


def clock(seconds: float) -> str:
    """1:02:03, or 2:03, or 8 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def size(count: int) -> str:
    """Bytes in the unit that leaves a readable number."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if count < 1e7 else f"{count / 1e6:.0f} MB"
