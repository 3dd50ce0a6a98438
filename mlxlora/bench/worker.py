"""The fresh process: one Job as its argument, one line of JSON as its answer.

A process of its own for every measurement: caches, compiled traces and patched classes of
one side (mlx-lm's checkpointing patches the block's class) must not reach the other.
"""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.bench.decode import PREPARATIONS, decode
from mlxlora.bench.job import Decoded, Job, Model, Trained
from mlxlora.bench.limit import matrix_rate, operations
from mlxlora.bench.shapes import (
    SHAPES,
    build,
    dtype_of,
    open_directory,
    vocabulary,
    weight_count,
)
from mlxlora.bench.sides import TRAINERS, Meter
from mlxlora.bench.workloads import updates_of
from mlxlora.errors import MlxLoraError
from mlxlora.memory import peak_memory
from mlxlora.model_files import read_config


def perform(job: Job) -> Trained | Decoded:
    """Measure what the job asks for, in this process."""
    if job.shape:
        config = SHAPES[job.shape]
        model = build(config, job.bits)
    else:
        config = read_config(Path(job.path))
        model = open_directory(Path(job.path), job.bits)
    about = _about(model, config, job)
    measure = _train if job.workload else _decode
    return measure(model, config, job, about)


def _about(model: nn.Module, config: dict[str, Any], job: Job) -> Model:
    own = config.get("quantization") or {}
    return Model(
        name=job.shape or Path(job.path).name,
        weights=weight_count(model),
        dtype=str(dtype_of(model)).rpartition(".")[2],
        bits=job.bits or own.get("bits", 0),
        device=str(mx.device_info().get("device_name", mx.default_device())),
    )


def _train(model: nn.Module, config: dict[str, Any], job: Job, about: Model) -> Trained:
    dtype = dtype_of(model)
    updates = updates_of(job.workload, job.batch, job.updates, vocabulary(config))
    meter = Meter(updates)
    TRAINERS[job.side](model, job, meter)
    examples = [example for update in updates for example in update]
    return Trained(
        model=about,
        losses=tuple(meter.losses),
        seconds=meter.seconds,
        peak_memory=meter.peak_memory,
        tokens=sum(len(example.tokens) - 1 for example in examples),
        supervised=sum(example.supervised for example in examples),
        operations=operations(config, job.rank, examples),
        matrix_rate=matrix_rate(dtype),
    )


def _decode(model: nn.Module, config: dict[str, Any], job: Job, about: Model) -> Decoded:
    PREPARATIONS[job.side](model, job)
    tokens, seconds = decode(model, vocabulary(config))
    return Decoded(about, tuple(tokens), seconds, peak_memory())


def main() -> None:
    job = Job.from_json(sys.argv[1])
    _die_first()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # only the answer goes there
            answer = dataclasses.asdict(perform(job))
    except MlxLoraError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)


def _die_first() -> None:
    """On Linux, should memory run out, this process is the one to be ended, no other."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


if __name__ == "__main__":
    main()
