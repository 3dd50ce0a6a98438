"""What must not grow again: bytes of a step beside mlx-lm's, traces, memory over a long run."""

import json
import random

import memory
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.trainer import default_loss
from zoo import model_of

from mlxlora.config import LoraConfig, RunConfig, TrainConfig
from mlxlora.data.layout import MAX_SHAPES, choose_layout
from mlxlora.data.render import Example
from mlxlora.lora.fresh import new_layers
from mlxlora.train import loop
from mlxlora.train.events import Start, Step
from mlxlora.train.optim import make_optimizer
from mlxlora.train.step import Stepper

WORDS = 32_000


def rows(lengths: list[int]) -> list[Example]:
    """Rows of which the second half is trained."""
    draw = np.random.default_rng(0)
    return [
        Example(n, draw.integers(0, WORDS, length, np.int32), np.arange(length) >= length // 2)
        for n, length in enumerate(lengths)
    ]


def peak(step) -> int:
    step()  # what is made once, is made
    return memory.peak(step)


@pytest.mark.parametrize(
    ("lengths", "most"), [([60, 100, 140, 400], 0.16), ([300] * 4, 0.25), ([1200], 0.16)]
)
def test_a_step_holds_a_fraction_of_what_mlx_lm_s_holds(monkeypatch, lengths, most):
    monkeypatch.setattr("mlxlora.train.logprobs.block_bytes", lambda: 1 << 20)  # a small case
    monkeypatch.setattr("mlxlora.train.attention.block_bytes", lambda: 1 << 20)
    model = model_of("qwen3", vocab_size=WORDS, tie_word_embeddings=True)
    new_layers(model, LoraConfig(rank=8), 0)
    model.train()
    examples = rows(lengths)

    width = 1 + -(-max(lengths) // 32) * 32  # as mlx-lm pads
    batch = np.zeros((len(examples), width), np.int32)
    for row, example in enumerate(examples):
        batch[row, : len(example.tokens)] = example.tokens
    spans = mx.array([(len(e.tokens) // 2, len(e.tokens)) for e in examples])
    loss_and_gradients = nn.value_and_grad(model, default_loss)
    theirs = peak(lambda: mx.eval(loss_and_gradients(model, mx.array(batch), spans)))

    stepper = Stepper(model, make_optimizer(TrainConfig()), clip=1.0)
    layout = choose_layout(
        [e.size for e in examples], max(lengths), len(lengths), 2048, packed=True, exact=True
    )
    ours = peak(lambda: stepper.step(tuple(layout.cut(examples)), 0, 1, 1e-4))
    assert ours < most * theirs


def varied_rows(path, count: int) -> None:
    draw = random.Random(0)
    for name, rows in (("train", count), ("valid", 20)):
        with (path / f"{name}.jsonl").open("w") as file:
            for number in range(rows):
                words = "x" * round(draw.lognormvariate(3.2, 0.7))
                row = {"prompt": f"{number} {words[::2]}", "completion": words + "y"}
                file.write(json.dumps(row) + "\n")


def config(base, path, *options: str) -> RunConfig:
    places = {"model": base.path, "data.path": path, "out": path / "run"}
    return RunConfig.load(None, [*(f"{k}={v}" for k, v in places.items()), *options])


def as_compiled(monkeypatch) -> list[tuple[int, ...]]:
    """Compile as on a GPU; returns a list that gets the input's shape at every trace."""
    traces: list[tuple[int, ...]] = []
    plain = mx.compile

    def counting(function, **state):
        def traced(*args, **options):
            if function.__name__ == "accumulate":
                traces.append(args[2].shape)
            return function(*args, **options)

        return plain(traced, **state)

    monkeypatch.setattr("mlxlora.train.step.compiles", lambda: True)
    monkeypatch.setattr("mlxlora.train.fitting.compiles", lambda: True)
    monkeypatch.setattr(mx, "compile", counting)
    return traces


def test_a_run_over_rows_of_all_lengths_compiles_few_shapes(dense, tmp_path, monkeypatch):
    traces = as_compiled(monkeypatch)
    varied_rows(tmp_path, 300)
    options = ["data.max_length=512", "train.updates=60", "train.tokens_per_microbatch=512"]
    run = config(dense, tmp_path, *options)
    events = list(loop.train(run, dense))
    start = next(event for event in events if isinstance(event, Start))
    assert 3 < len(start.shapes) <= MAX_SHAPES
    assert 3 < len(traces) <= len(start.shapes)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_memory_is_flat_over_two_thousand_updates(dense, tmp_path, monkeypatch, compiled):
    if compiled:
        as_compiled(monkeypatch)
    varied_rows(tmp_path, 500)
    options = ["data.max_length=256", "train.updates=2000", "train.batch_size=2"]
    run = config(dense, tmp_path, *options)
    held, resident = [], []
    for event in loop.train(run, dense):
        if isinstance(event, Step):
            mx.synchronize()
            held.append(mx.get_active_memory())
            resident.append(_resident())
    assert len(held) == 2000
    # A shape that comes late brings a trace of its own.
    assert max(held[1000:]) < 1.1 * max(held[:200])
    assert max(resident[1000:]) - max(resident[:500]) < 24 << 20


def _resident() -> int:
    """Bytes of this process in memory, or 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
