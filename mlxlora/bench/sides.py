"""The two trainers: mlx-lm's own, and ours, over the same updates of the same model.

Each runs every update twice. The first pass compiles and fills the caches; the second is
measured. mlx-lm's side is mlx_lm.tuner.trainer.train as it is installed, driven from
outside: nothing of it is copied or replaced.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as opt
import numpy as np
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback

from mlxlora.base import training_mode
from mlxlora.bench.attached import attach_mlx_lm, attach_ours
from mlxlora.bench.job import MLX_LM, OURS, Job
from mlxlora.bench.workloads import WORKLOADS, typical_sizes
from mlxlora.data.layout import choose_layout
from mlxlora.data.render import Example
from mlxlora.machine import compiles, token_budget
from mlxlora.memory import keep_freed_pages, peak_memory
from mlxlora.products import choose_products
from mlxlora.train.forward import Forward
from mlxlora.train.step import Stepper

# mlxlora's default: enough for the losses to show whether both sides learn the same.
RATE = 2e-4
PAD_TO = 32  # mlx-lm pads a batch to a multiple of this, plus one

Updates = list[list[Example]]  # the rows of each optimizer update


class Meter:
    """Hands out the updates twice and reads clock and memory over the second pass."""

    def __init__(self, updates: Updates) -> None:
        self.updates = updates
        self.losses: list[float] = []
        self.seconds = 0.0
        self.peak_memory = 0
        self._began = 0.0

    @property
    def count(self) -> int:
        return 2 * len(self.updates)

    def each(self) -> Iterator[list[Example]]:
        yield from self.updates
        mx.synchronize()
        mx.reset_peak_memory()
        self._began = time.perf_counter()
        yield from self.updates

    def done(self, loss: float) -> None:
        """To be told after every update; the last one is waited for."""
        self.losses.append(loss)
        if len(self.losses) == self.count:
            mx.synchronize()
            self.seconds = time.perf_counter() - self._began
            self.peak_memory = peak_memory()


def train_ours(model: nn.Module, job: Job, meter: Meter) -> None:
    """What `mlxlora train` does for these updates; the one place here that knows how."""
    choose_products(model, token_budget())
    attach_ours(model, job.rank)
    sizes = typical_sizes(job.workload)
    longest = max(n for n, _ in [*sizes, *(e.size for update in meter.updates for e in update)])
    keep_freed_pages()
    forward = Forward(model)
    forward.checkpoint_blocks = job.checkpoint_blocks
    layout = choose_layout(
        sizes, longest, job.batch, token_budget(), packed=forward.packs, exact=not compiles()
    )
    stepper = Stepper(model, _optimizer(), clip=0.0, forward=forward)
    with training_mode(model):
        for number, examples in enumerate(meter.each(), start=1):
            batches = tuple(layout.cut(examples))
            loss, _, _ = stepper.step(batches, seed=0, update=number, rate=RATE)
            meter.done(loss)


def train_mlx_lm(model: nn.Module, job: Job, meter: Meter) -> None:
    """mlx-lm's training loop over these updates."""
    attach_mlx_lm(model, job.rank)

    class Report(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            meter.done(train_info["train_loss"])

    # Its loop evaluates everything before it asks for the next batch, so the time between
    # two batches is the time of an update.
    def batches(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for examples in meter.each():
            yield _padded(examples, WORKLOADS[job.workload].longest)

    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        args = trainer.TrainingArgs(
            batch_size=job.batch,
            iters=meter.count,
            steps_per_report=1,
            steps_per_save=meter.count + 1,
            adapter_file=str(Path(directory) / "adapters.safetensors"),
            grad_checkpoint=job.checkpoint_blocks,
        )
        trainer.train(
            model,
            _optimizer(),
            train_dataset=None,
            args=args,
            iterate_batches=batches,
            training_callback=Report(),
        )


def _padded(examples: list[Example], longest: int) -> tuple[mx.array, mx.array]:
    """(tokens (B, T), [first, last] trained position (B, 2)), as mlx-lm's own batches are.

    mlx-lm gives the row's length as the last position, and so trains the padding token that
    follows the row. length - 1 leaves that token out: both sides train the same tokens.
    """
    lengths = [len(example.tokens) for example in examples]
    width = min(1 + PAD_TO * -(-max(lengths) // PAD_TO), longest)
    tokens = np.zeros((len(examples), width), np.int32)
    for row, example in enumerate(examples):
        tokens[row, : lengths[row]] = example.tokens
    spans = [(int(np.argmax(e.mask)), n - 1) for e, n in zip(examples, lengths, strict=True)]
    return mx.array(tokens), mx.array(spans)


def _optimizer() -> opt.Optimizer:
    return opt.AdamW(RATE, weight_decay=0.0, bias_correction=True)


TRAINERS: dict[str, Callable[[nn.Module, Job, Meter], None]] = {
    OURS: train_ours,
    MLX_LM: train_mlx_lm,
}
