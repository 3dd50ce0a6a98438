"""Both sides in alternation, each measurement in a fresh process.

Machines grow warm and are shared, so one side after the other would compare two different
machines. Every round runs both, the first to go changing from round to round, and a ratio
is taken within its round. That both did the same work is checked before speed is reported.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from mlxlora.bench.job import MLX_LM, OURS, Decoded, Job, Trained, answer_of
from mlxlora.bench.report import Decoding, Report, Training
from mlxlora.bench.shapes import SHAPES
from mlxlora.bench.workloads import WORKLOADS
from mlxlora.errors import ConfigError, MlxLoraError
from mlxlora.model_files import check_directory, find, read_config

AGAINST = (MLX_LM, "none")
BITS = (0, 4, 8)
TAIL_LINES = 12  # of what a process that failed said last
# Relative difference of losses that is no more than rounding, in float32 and in anything else.
# (float32 sums over thousands of tokens differ by up to 1e-5.)
EXACT, ROUNDED = 3e-4, 2e-2

NO_MEMORY = ("bad_alloc", "Unable to allocate", "out of memory")  # how MLX says it

Progress = Callable[[str, int, int], None]  # (what, done, of)


class BenchError(MlxLoraError):
    """A measurement that failed, or two that cannot be compared: no fault of the input."""


class OutOfMemory(BenchError):
    """The machine is too small for what this side wanted."""


@dataclass(frozen=True)
class Options:
    """What to measure. 0 for batch and updates: the workload's own."""

    model: str = ""  # directory or Hub id; "" for the shape
    shape: str = "small"
    workloads: tuple[str, ...] = ("answers",)
    bits: int = 0
    batch: int = 0  # rows per optimizer update
    rank: int = 8
    against: str = MLX_LM
    rounds: int = 3
    updates: int = 0  # optimizer updates measured
    checkpoint_blocks: bool = False
    train: bool = True
    decode: bool = True

    @property
    def sides(self) -> tuple[str, ...]:
        return (OURS,) if self.against == "none" else (self.against, OURS)


def bench(options: Options, progress: Progress) -> Report:
    """Measure. Raises ConfigError for options that cannot be, BenchError if the sides differ."""
    check(options)
    jobs = _jobs(options)
    total, done = len(jobs) * options.rounds * len(options.sides), 0
    measured = []
    for job in jobs:
        runs: dict[str, tuple[Any, ...]] = {side: () for side in options.sides}
        for number in range(options.rounds):
            for side in list(runs) if number % 2 == 0 else list(runs)[::-1]:
                progress(f"{job.workload or 'decoding'}, {side}", done, total)
                try:
                    runs[side] += (run(replace(job, side=side)),)
                except OutOfMemory:
                    if side == OURS:
                        raise
                    del runs[side]  # ours is measured all the same
                done += 1
            if number == 0:  # before the other rounds are waited for
                agree(_result(job, runs))
        measured.append(_result(job, runs, tuple(s for s in options.sides if s not in runs)))
    return Report(
        options.rank,
        options.rounds,
        options.against,
        tuple(found for found in measured if isinstance(found, Training)),
        next((found for found in measured if isinstance(found, Decoding)), None),
    )


def _result(
    job: Job, runs: dict[str, tuple[Any, ...]], out_of_memory: tuple[str, ...] = ()
) -> Training | Decoding:
    runs = dict(runs)
    if not job.workload:
        return Decoding(runs)
    return Training(job, WORKLOADS[job.workload].about, runs, out_of_memory)


def check(options: Options) -> None:
    """Raise ConfigError for a name or a combination that cannot be measured."""
    named: list[tuple[str, str, Iterable[str]]] = [
        ("--shape", options.shape, SHAPES),
        ("--against", options.against, AGAINST),
        *(("--workload", name, WORKLOADS) for name in options.workloads),
    ]
    for flag, name, table in named:
        if name not in table:
            raise ConfigError(f"{flag} must be {_either(table)}, not {name!r}")
    if options.bits not in BITS:
        raise ConfigError(f"--bits must be {_either(BITS)}, not {options.bits}")
    if not (options.train or options.decode):
        raise ConfigError("--no-train and --no-decode together leave nothing to measure")


def _either(names: Iterable[object]) -> str:
    *most, last = (str(name) for name in names)
    return f"{', '.join(most)} or {last}"


def _jobs(options: Options) -> list[Job]:
    """One job for each workload, and one to decode; their side is still to be chosen."""
    path = ""
    if options.model:
        directory, _ = find(options.model)
        check_directory(directory)
        if options.bits and "quantization" in read_config(directory):
            raise ConfigError(f"--bits {options.bits}: {options.model} is quantized already")
        path = str(directory)
    decoding = Job(
        side=OURS,
        shape="" if path else options.shape,
        path=path,
        bits=options.bits,
        rank=options.rank,
        workload="",
        checkpoint_blocks=options.checkpoint_blocks,
    )
    jobs = [
        replace(
            decoding,
            workload=name,
            batch=options.batch or WORKLOADS[name].batch,
            updates=options.updates or WORKLOADS[name].updates,
        )
        for name in dict.fromkeys(options.workloads)
    ]
    return jobs * options.train + [decoding] * options.decode


def run(job: Job) -> Trained | Decoded:
    """Have a fresh process do the job. Raises BenchError with its last words if it fails."""
    command = [sys.executable, "-P", "-m", "mlxlora.bench.worker", job.to_json()]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        what = f"{job.side}, {job.workload or 'decoding'}"
        tail = "\n".join(f"  {line}" for line in process.stderr.splitlines()[-TAIL_LINES:])
        if process.returncode == -signal.SIGKILL or any(w in process.stderr for w in NO_MEMORY):
            raise OutOfMemory(
                f"memory ran out while {what} was measured: a smaller --batch or --shape helps"
            )
        code = process.returncode
        ended = f"failed (exit code {code})" if code > 0 else f"was ended by signal {-code}"
        raise BenchError(f"the process that measured {what} {ended}:\n{tail}".rstrip())
    answer: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if "error" in answer:
        raise MlxLoraError(answer["error"])
    return answer_of(Trained if job.workload else Decoded, answer)


def agree(result: Training | Decoding) -> None:
    """Raise BenchError unless both sides had the same loss at every update.

    The first shows that they trained the same tokens of the same model; the later ones that
    they learned the same from them.
    """
    if isinstance(result, Decoding):
        return
    model = result.one.model
    most = EXACT if model.dtype == "float32" and not model.bits else ROUNDED
    differences = result.loss_differences()
    wrong = [n for n, difference in enumerate(differences) if not difference < most]  # nor NaN
    if wrong:
        losses = [f"{side} {runs[0].losses[wrong[0]]:.6g}" for side, runs in result.runs.items()]
        raise BenchError(
            f"{result.job.workload}: the two sides did not do the same work, so their speeds are "
            f"not reported.\nTheir losses at update {wrong[0] + 1} should agree: "
            f"{', '.join(losses)}."
        )
