"""Everything a person sees in the terminal: every call of rich is here.

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

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlxlora.errors import printable
from mlxlora.files import finite
from mlxlora.train.events import Done, Eval, Event, Resumed, Sample, Saved, Skipped, Start, Step

PLAIN_SECONDS = 10.0  # between step lines when the output is not a terminal
SMOOTHING = 0.9  # of the loss and the rate shown, per update


class Screen:
    """Where text goes: stdout, or stderr when stdout is kept for --json."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._console = Console(stderr=as_json, highlight=False, soft_wrap=False)
        self._counter: Live | None = None

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
        if not self._console.is_terminal:
            return
        if self._counter is None:
            self._counter = Live(console=self._console, transient=True, refresh_per_second=8)
            self._counter.start()
        self._counter.update(Text(f"{what}  {done}" + (f"/{of}" if of is not None else ""), "dim"))


def fail(message: str) -> None:
    """The one message of an error, on stderr."""
    first, _, rest = message.partition("\n")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text("error: ", "bold red").append(first, "default"))
    if rest:
        console.print(Text(rest))


class TrainingDisplay:
    """Shows the events of a run: a live line in a terminal, plain lines elsewhere."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self._start: Start | None = None
        self._validations = 0
        self._loss = self._rate = float("nan")
        self._began = self._said = time.monotonic()
        self._from = 0  # the update that this process began after

    def show(self, events: Iterator[Event]) -> Done | None:
        """Consume the events; return the last one."""
        done = None
        live = self.screen.console.is_terminal
        with Live(
            Text(), console=self.screen.console, transient=True, auto_refresh=False
        ) as region:
            for event in events:
                if isinstance(event, Done):
                    done = event
                with self.screen.unless_gone():
                    self._present(event, region, live)
        return done

    def _present(self, event: Event, region: Live, live: bool) -> None:
        if isinstance(event, Done):
            region.update(Text(), refresh=True)
        self._show(event)
        if isinstance(event, Start) and live:
            region.update(Text("starting", "dim"), refresh=True)
        if isinstance(event, Step) and live:
            region.update(self._status(event), refresh=True)

    def _show(self, event: Event) -> None:
        say = self.screen.say
        if isinstance(event, Start):
            self._begin(event)
        elif isinstance(event, Step):
            self._smooth(event)
        elif isinstance(event, Eval):
            self._validation(event)
        elif isinstance(event, Resumed):
            self._resume(event)
        elif isinstance(event, Skipped):
            say(
                f"{event.update:>7}  skipped: {event.reason}; rows {', '.join(event.rows)}",
                "yellow",
            )
        elif isinstance(event, Saved) and event.why not in ("best", "checkpoint"):
            say(f"{event.update:>7}  saved {event.path} ({event.why})", "dim")
        elif isinstance(event, Sample):
            say(f"{event.update:>7}  {_short(event.prompt, 60)}", "dim")
            say(f"         {event.text.strip()}")
        elif isinstance(event, Done):
            self._finish(event)

    def _begin(self, event: Start) -> None:
        self._start = event
        share = 100 * event.trainable / max(1, event.parameters)
        rows = f"{event.rows:,} for training, {event.valid_rows:,} for validation"
        if event.skipped_rows:
            rows += f", {event.skipped_rows:,} bad ones skipped"
        self.screen.facts(
            [
                ("rows", rows),
                (
                    "trained",
                    f"{event.trainable:,} of {event.parameters:,} parameters ({share:.3g} %)"
                    + (f" in {event.adapted} layers" if event.adapted else ""),
                ),
                ("updates", f"{event.updates:,}, learning rate up to {event.learning_rate:g}"),
                ("computed", _ways(event)),
            ]
        )
        for note in event.notes:
            self.screen.say(f"note: {note}", "yellow")

    def _resume(self, event: Resumed) -> None:
        self._from = event.update
        where = f"after update {event.update}" if event.update else "from the beginning"
        self.screen.say(f"{event.update:>7}  going on {where}", "green")
        for note in event.notes:
            self.screen.say(f"note: {note}", "yellow")

    def _smooth(self, event: Step) -> None:
        rate = event.tokens / max(event.seconds, 1e-9)
        if self._loss != self._loss:
            self._loss, self._rate = event.loss, rate
        elif event.tokens:
            self._loss = SMOOTHING * self._loss + (1 - SMOOTHING) * event.loss
            self._rate = SMOOTHING * self._rate + (1 - SMOOTHING) * rate
        now = time.monotonic()
        if not self.screen.console.is_terminal and now - self._said > PLAIN_SECONDS:
            self._said = now
            self.screen.say(f"{event.update:>7}  {self._figures(event)}")

    def _figures(self, event: Step) -> str:
        return (
            f"loss {self._loss:.3f}  lr {event.learning_rate:.1e}  grad {event.grad_norm:.2f}  "
            f"{self._rate:,.0f} tok/s  peak {size(event.peak_memory)}"
        )

    def _validation(self, event: Eval) -> None:
        mark = "  best so far" if event.best else ""
        if event.update == 0:
            mark = "  before training"
        line = f"{event.update:>7}  validation loss {event.loss:.3f}  "
        line += f"perplexity {event.perplexity:.4g}{mark}"
        self.screen.say(line, "green" if event.best else "")

    def _status(self, event: Step) -> Group:
        assert self._start is not None
        total = self._start.updates
        elapsed = time.monotonic() - self._began
        left = elapsed / (event.update - self._from) * (total - event.update)
        head = Table.grid(padding=(0, 2, 0, 0))
        head.add_row(
            ProgressBar(total=total, completed=event.update, width=30),
            Text(f"{event.update}/{total}", "bold"),
            Text(f"epoch {event.epoch:.2f}"),
            Text(f"{clock(left)} left", "dim"),
            Text(self._next_validation(event.update), "dim"),
        )
        return Group(head, Text(self._figures(event), no_wrap=True, overflow="ellipsis"))

    def _next_validation(self, update: int) -> str:
        assert self._start is not None
        every = self._start.validates_every
        following = min(update - update % every + every, self._start.updates)
        return f"validates at {following}" if self._start.valid_rows else ""

    def _finish(self, event: Done) -> None:
        say = self.screen.say
        if self._start is None:
            say(f"This run is finished already, after update {event.update}; nothing was done.")
        if event.valid_loss is not None and event.valid_loss_before is not None:
            say(
                f"validation loss {event.valid_loss_before:.3f} -> {event.valid_loss:.3f}  "
                f"(update {event.best_update})",
                "bold green" if event.valid_loss < event.valid_loss_before else "bold yellow",
            )
        if event.reason == "early stop":
            say("stopped early: validation had stopped improving")
        for count, what in (
            (event.truncated_rows, "rows were cut to data.max_length"),
            (event.dropped_rows, "rows had nothing left to train and were left out"),
        ):
            if count:
                say(f"note: {count:,} {what}", "yellow")
        whole = f" (the process {size(event.footprint)})" if event.footprint else ""
        peak = f"peak {size(event.peak_memory)}{whole}"
        say(f"{clock(event.seconds)}, {peak}, adapter in {event.adapter}")


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


def _ways(event: Start) -> str:
    """How updates are computed here, in a few words."""
    how = "rows packed" if event.packed else "rows of like length padded"
    words = [f"{how}, about {event.tokens_per_microbatch:,} tokens at once"]
    if event.products:
        words.append(f"quantized weights {event.products}")
    if event.checkpoint_blocks:
        words.append("blocks computed again in the backward pass, to save memory")
    return "; ".join(words)


def _short(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
