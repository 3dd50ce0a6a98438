"""What train and resume share: stopping on a signal, the display, the end, the supervisor."""

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from mlxlora.train.places import START

Supervise = Annotated[
    bool | None,
    typer.Option(
        "--supervise/--no-supervise",
        help="train under a small parent that goes on from the last checkpoint if the system ends "
        "the training (memory, GPU watchdog)",
        show_default="on macOS",
    ),
]


def follow(
    events: Callable[[threading.Event], Iterator[Any]],
    model: str,
    out: Path,
    as_json: bool,
    track: Sequence[str] = (),
) -> None:
    """Show a run's events to the end, then what to do next. Exits with 3 if it can go on."""
    from mlxlora.console import Screen
    from mlxlora.display import TrainingDisplay
    from mlxlora.track.follow import check, tracked

    screen = Screen(as_json)
    check(track)
    try:
        with stop_on_signal(screen.say, (out / START).exists) as stop:
            done = TrainingDisplay(screen).show(tracked(events(stop), out, track, screen.say))
    except KeyboardInterrupt:
        if not (out / START).exists():
            screen.say("Interrupted before the run began; nothing was written.")
            raise typer.Exit(130) from None
        screen.say("Stopped at once. What came after the last checkpoint is computed again by:")
        screen.command("mlxlora", "resume", out)
        raise typer.Exit(3) from None
    except OSError:
        if (out / START).exists():
            screen.say("When that is mended, the run goes on from its last checkpoint with:")
            screen.command("mlxlora", "resume", out)
        raise
    assert done is not None
    screen.result(dataclasses.asdict(done))
    if done.reason == "interrupted":
        screen.say(
            f"Interrupted after update {done.update}; its weights are in {done.last}.", "yellow"
        )
        screen.say("To go on as if nothing had happened:")
        screen.command("mlxlora", "resume", out)
        if done.last != done.adapter:
            screen.say(f"The best by validation loss is from update {done.best_update}:", "yellow")
    named = ("--model", model, "--adapter", done.adapter)
    screen.command("mlxlora", "chat", *named)
    screen.command("mlxlora", "fuse", *named, "--out", "fused")
    if done.reason == "interrupted":
        raise typer.Exit(3)


def supervised(
    wished: bool | None, out: Path, as_json: bool, trust: bool, track: Sequence[str] = ()
) -> None:
    """If the run is to be supervised, do that in this process and exit; else do nothing.

    The child is this very command line with --no-supervise.
    """
    if not (sys.platform == "darwin" if wished is None else wished):
        return
    from mlxlora.train.supervise import Child, supervise

    options = ["--no-supervise"] + ["--json"] * as_json + ["--trust-remote-code"] * trust
    options += [f"--track={name}" for name in track]
    program = [sys.executable, "-P", "-m", "mlxlora.cli"]  # -P: nothing of the current directory
    again = [*program, "resume", str(out), *options]
    raise typer.Exit(supervise(Child([*program, *sys.argv[1:], "--no-supervise"], again), out))


@contextmanager
def stop_on_signal(
    say: Callable[[str], None], begun: Callable[[], bool]
) -> Iterator[threading.Event]:
    """A signal (Ctrl-C, a closed terminal) ends the run after its update; a second one now.

    So does the first if the run has not begun.
    """
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set() or not begun():
            raise KeyboardInterrupt
        stop.set()
        say("Stopping after this update and saving; once more to stop at once.")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else nohup wants us to live
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
