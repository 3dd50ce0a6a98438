"""A small parent that keeps a training run alive: it starts it again when the system ended it.

Memory runs out, the GPU watchdog aborts a process: neither can be caught from inside. The parent
imports no MLX and holds nothing; the child trains, and is told where it was by its checkpoints.
A child that ends by itself, well or with an error, is not started again.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from mlxlora.train.places import LOG, START, checkpoints_in

DEATHS = 3  # in a row without a newer checkpoint, then it is given up
TAIL = 4 << 10  # bytes of the child's stderr that are kept to see why it died
LAST_WORDS = 12  # lines of it that are looked at
INTERRUPTED, NOT_BEGUN = 3, 130  # exit codes: can go on; interrupted with nothing written
OOM_COUNTERS = tuple(
    Path(name)
    for name in (
        "/sys/fs/cgroup/memory.events",
        "/sys/fs/cgroup/memory/memory.oom_control",
        "/proc/vmstat",
    )
)
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# What the child wrote before it died -> what that means, and whether it was memory.
SIGNS: tuple[tuple[str, str, bool], ...] = (
    ("ImpactingInteractivity", "macOS stopped its GPU work because it held up the screen", False),
    ("ErrorTimeout", "macOS stopped its GPU work because it took too long (the watchdog)", False),
    ("ErrorHang", "macOS stopped its GPU work because it seemed to hang", False),
    ("CallbackErrorOutOfMemory", "the GPU ran out of memory", True),
    ("Insufficient Memory", "the GPU ran out of memory", True),
    ("Unable to allocate", "memory ran out", True),
    ("maximum allowed buffer size", "an array was larger than the GPU allows", True),
    ("out of memory", "memory ran out", True),
    ("bad_alloc", "memory ran out", True),
    ("MemoryError", "memory ran out", True),
)
BY_SIGNAL = {
    signal.SIGABRT: "MLX aborted it",
    signal.SIGSEGV: "it crashed (invalid memory access)",
    signal.SIGBUS: "it crashed (invalid memory access)",
    signal.SIGKILL: "something ended it from outside (SIGKILL)",
}


@dataclass(frozen=True)
class Child:
    """Command lines: to begin the run, and to go on with it."""

    begin: Sequence[str]
    again: Sequence[str]


@dataclass(frozen=True)
class Death:
    """Why a child is no more, in plain words."""

    cause: str
    memory: bool = False


def supervise(child: Child, run: Path) -> int:
    """Keep the run going until it ends by itself or is given up: the exit code.

    After a death by memory the child computes its updates in smaller pieces.
    """
    command, deaths, reached = list(child.begin), 0, _reached(run)
    while True:
        code, death, stopped = _once(command, run)
        if death is None:
            return code
        _say(f"Training died: {death.cause}.")
        if stopped and (run / START).exists():
            _say(f"It was to stop, so it is not started again. To go on:\n  mlxlora resume {run}")
            return INTERRUPTED
        now = _reached(run)
        deaths = 1 if now > reached else deaths + 1
        reached = max(now, reached)
        if deaths >= DEATHS or not (run / START).exists():
            return _give_up(run, deaths)
        # What dies twice at the same place is given less at once, whatever it died of.
        smaller = death.memory or deaths > 1
        where = f"update {now}" if now else "the beginning"
        _say(f"Going on from {where}{', in smaller pieces' if smaller else ''}.")
        command = [*child.again, "--because", death.cause, *["--smaller"] * smaller]


def why(code: int, tail: str, oom_kills: int, finished: bool) -> Death | None:
    """What ended a child: None if it ended by itself.

    code: its exit code, negative for a signal; tail: the last it wrote to stderr; oom_kills: by
    how much the system's count of processes killed for memory grew meanwhile, -1 if it keeps none.
    """
    if code == 0:
        return None if finished else Death("it was lost without an exit code")
    if code > 1 or code in (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP):
        return None  # what it says of itself; only 1 is a surprise to it too
    last = "\n".join(tail.splitlines()[-LAST_WORDS:])
    for sign, meaning, memory in SIGNS:
        if sign in last:
            return Death(meaning, memory)
    if code > 0:
        return None
    if code == -signal.SIGKILL and oom_kills:
        said = "the system ended it because memory ran out"
        return Death(said if oom_kills > 0 else f"{said}, most likely", memory=True)
    number = -code
    known = {int(n): words for n, words in BY_SIGNAL.items()}
    return Death(known.get(number, f"it was ended by signal {number}"))


def _once(command: Sequence[str], run: Path) -> tuple[int, Death | None, bool]:
    """Run the command to its end: (exit code, why it died if it did, was it asked to stop)."""
    before = _oom_kills()
    tail = bytearray()
    with subprocess.Popen(command, stderr=subprocess.PIPE, process_group=0) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=_copy, args=(process.stderr, tail), daemon=True)
        reader.start()
        with _forwarding(process) as asked:
            code = process.wait()
        reader.join(timeout=5)  # a grandchild may still hold the pipe
    killed = -1 if before is None else (_oom_kills() or 0) - before
    death = why(code, tail.decode("utf-8", "replace"), killed, _ended(run))
    if code < 0:
        code = INTERRUPTED if (run / START).exists() else NOT_BEGUN
    return code, death, bool(asked)


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Signals to us go to the child, once each: it is in a process group of its own.

    Yields the list of those that came.
    """
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        process.send_signal(number)

    def pause(number: int, frame: FrameType | None) -> None:
        process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)

    handlers = {number: forward for number in FORWARDED} | {signal.SIGTSTP: pause}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup wants us to live
        del handlers[signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _copy(source: IO[bytes], tail: bytearray) -> None:
    """Pass on what the child writes, and remember the end of it."""
    while chunk := os.read(source.fileno(), 4096):
        tail += chunk
        del tail[:-TAIL]
        with contextlib.suppress(OSError):
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()


def _reached(run: Path) -> int:
    """The update of the newest checkpoint."""
    return next(iter(checkpoints_in(run)), 0)


def _ended(run: Path) -> bool:
    """Whether the log's last line is the run's end."""
    try:
        return (run / LOG).read_bytes().rpartition(b'{"event": "')[2].startswith(b"done")
    except OSError:
        return False


def _oom_kills() -> int | None:
    """How many processes the system has killed for memory, or None if it keeps no count."""
    for path in OOM_COUNTERS:
        with contextlib.suppress(OSError, ValueError):
            fields = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
            if "oom_kill" in fields:
                return int(fields["oom_kill"])
    return None


def _give_up(run: Path, deaths: int) -> int:
    if not (run / START).exists():
        _say("It died before the run began: the model may not fit. See: mlxlora plan --help")
        return 2
    times = f"{deaths} times in a row without getting further"
    _say(f"It died {times}, so it is not started again. To try once more:")
    _say(f"  mlxlora resume {run}")
    return INTERRUPTED


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr, flush=True)
