"""A run's events on the screen: a few live lines in a terminal, plain lines elsewhere.

What stays on the screen are the validations, what was saved at the end and what went wrong; the
live lines below them are drawn anew in place, four times a second, and are gone at the end.
"""

import time
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlxlora.console import Screen, clock, size
from mlxlora.course import Course
from mlxlora.errors import printable
from mlxlora.sparkline import ASCII_BARS, BARS, sparklines
from mlxlora.train.events import Done, Eval, Event, Resumed, Sample, Saved, Skipped, Start, Step

PLAIN_SECONDS = 10.0  # between step lines when the output is not a terminal
REDRAWN = 4  # times a second
SAMPLES = 2  # prompts whose last answers are among the live lines
LONGEST_CURVE = 48  # columns
BESIDE_CURVE = 52  # columns of a line that its figures take


class TrainingDisplay:
    """Shows the events of a run."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.live = screen.console.is_terminal
        self._course: Course | None = None
        self._samples: dict[str, Sample] = {}  # the last of each prompt
        self._ended = False
        self._said = time.monotonic()

    def show(self, events: Iterator[Event]) -> Done | None:
        """Consume the events; return the last one."""
        done = None
        with Live(
            console=self.screen.console,
            transient=True,
            auto_refresh=self.live,
            refresh_per_second=REDRAWN,
            get_renderable=self._lines,
        ):
            for event in events:
                if isinstance(event, Done):
                    done = event
                with self.screen.unless_gone():
                    self._show(event)
        return done

    def _show(self, event: Event) -> None:
        say = self.screen.say
        if isinstance(event, Start):
            self._begin(event)
        elif isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Eval):
            self._validation(event)
        elif isinstance(event, Resumed):
            self._resume(event)
        elif isinstance(event, Skipped):
            say(
                f"{event.update:>7}  skipped: {event.reason}; rows {', '.join(event.rows)}",
                "yellow",
            )
        elif isinstance(event, Saved):
            self._saved(event)
        elif isinstance(event, Sample):
            self._samples[event.prompt] = event
            if not self.live:
                self._say_sample(event)
        elif isinstance(event, Done):
            self._finish(event)

    # --- what stays ----------------------------------------------------------------------

    def _begin(self, event: Start) -> None:
        self._course = Course(event)
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
        where = f"after update {event.update}" if event.update else "from the beginning"
        self.screen.say(f"{event.update:>7}  going on {where}", "green")
        for note in event.notes:
            self.screen.say(f"note: {note}", "yellow")

    def _step(self, event: Step) -> None:
        assert self._course is not None
        self._course.step(event)
        now = time.monotonic()
        if not self.live and now - self._said > PLAIN_SECONDS:
            self._said = now
            course = self._course
            self.screen.say(
                f"{event.update:>7}  loss {course.loss:.3f}  lr {event.learning_rate:.1e}  "
                f"grad {event.grad_norm:.2f}  {course.rate:,.0f} tok/s  "
                f"peak {size(event.peak_memory)}  {clock(course.seconds_left)} left"
            )

    def _validation(self, event: Eval) -> None:
        if self._course is not None:
            self._course.validated(event)
        mark = "  best so far" if event.best else ""
        if event.update == 0:
            mark = "  before training"
        line = f"{event.update:>7}  validation loss {event.loss:.3f}  "
        line += f"perplexity {event.perplexity:.4g}{mark}"
        self.screen.say(line, "green" if event.best else "")

    def _saved(self, event: Saved) -> None:
        if self._course is not None:
            self._course.saved(event)
        if event.why not in ("best", "checkpoint"):
            self.screen.say(f"{event.update:>7}  saved {event.path} ({event.why})", "dim")

    def _say_sample(self, event: Sample) -> None:
        self.screen.say(f"{event.update:>7}  {_short(event.prompt, 60)}", "dim")
        self.screen.say(f"         {event.text.strip()}")

    def _finish(self, event: Done) -> None:
        self._ended = True
        say = self.screen.say
        if self.live:
            for sample in self._samples.values():
                self._say_sample(sample)
        if self._course is None:
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

    # --- the live lines ------------------------------------------------------------------

    def _lines(self) -> RenderableType:
        """Drawn by another thread than the one that shows events, which only ever add."""
        course = self._course
        if course is None or self._ended or not self.live:
            return Text()
        if not course.losses:
            return Text("the first update ...", "dim")
        width = self.screen.console.width
        lines: list[RenderableType] = ["", _progress(course, width)]
        lines += self._curves(course, max(8, min(LONGEST_CURVE, width - BESIDE_CURVE)))
        lines.append(_resources(course))
        for sample in list(self._samples.values())[-SAMPLES:]:
            lines.append(_line((f"> {_one_line(sample.prompt)}", "dim")))
            lines.append(_line((f"  {_one_line(sample.text)}", "")))
        return Group(*lines)

    def _curves(self, course: Course, width: int) -> list[Text]:
        losses, checks = course.curves(width)
        bars = ASCII_BARS if self.screen.console.options.ascii_only else BARS
        curves = sparklines([losses, checks], bars)
        train = _line(
            ("train  ", "dim"),
            (curves[0], "cyan"),
            (f"  {course.loss:.3f}", "bold"),
            (f"   lr {course.learning_rate:.1e}   grad {course.grad_norm:.2f}", "dim"),
        )
        if not course.start.valid_rows:
            return [train]
        valid = _line(
            ("valid  ", "dim"),
            (curves[1], "green"),
            (f"  {course.validations[-1].loss:.3f}" if course.validations else "      -", "bold"),
            (_validations(course), "dim"),
        )
        return [train, valid]


def _progress(course: Course, width: int) -> Table:
    total = course.start.updates
    head = Table.grid(padding=(0, 2, 0, 0))
    head.add_row(
        ProgressBar(
            total=total,
            completed=course.update,
            width=max(10, min(40, width - 50)),
            complete_style="cyan",
        ),
        Text(f"{course.update}/{total}", "bold"),
        Text(f"epoch {course.epoch:.2f}", "dim"),
        Text(f"{clock(course.seconds_left)} left", no_wrap=True),
    )
    return head


def _validations(course: Course) -> str:
    """The best so far, and when the next one comes."""
    words = f"   best {course.best.loss:.3f} at {course.best.update}" if course.best else ""
    following = course.next_validation
    if not following:
        return words
    return f"{words}   next in {clock(course.seconds_until(following))}"


def _resources(course: Course) -> Text:
    limit = course.start.memory_limit
    memory = f"   memory {size(course.peak_memory)}"
    tight = limit and course.peak_memory > 0.9 * limit
    if limit:
        memory += f" of {size(limit)} ({100 * course.peak_memory / limit:.0f} %)"
    return _line(
        ("speed  ", "dim"),
        (f"{course.rate:,.0f} tok/s", ""),
        (memory, "yellow" if tight else ""),
        (f"   next save in {clock(course.next_save)}", "dim"),
    )


def _line(*parts: tuple[str, str]) -> Text:
    """One line of the screen, cut off at its end if need be."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for text, style in parts:
        line.append(printable(text), style)
    return line


def _ways(event: Start) -> str:
    """How updates are computed here, in a few words."""
    how = "rows packed" if event.packed else "rows of like length padded"
    words = [f"{how}, about {event.tokens_per_microbatch:,} tokens at once"]
    if event.products:
        words.append(f"quantized weights {event.products}")
    if event.checkpoint_blocks:
        words.append("blocks computed again in the backward pass, to save memory")
    return "; ".join(words)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _short(text: str, width: int) -> str:
    line = _one_line(text)
    return line if len(line) <= width else line[: width - 1] + "…"
