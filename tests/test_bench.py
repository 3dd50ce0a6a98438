"""bench: both sides do the same work, the rows are what they say, the arithmetic is counted."""

import dataclasses
import json
import math
from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from typer.testing import CliRunner

from mlxlora.bench.compare import BenchError, Options, agree, bench, check, run
from mlxlora.bench.job import MLX_LM, OURS, Decoded, Job, Model, Trained
from mlxlora.bench.limit import matrix_rate, operations
from mlxlora.bench.report import Decoding, Report, Training
from mlxlora.bench.shapes import SHAPES, build, weight_count
from mlxlora.bench.show import show_bench
from mlxlora.bench.sides import _padded
from mlxlora.bench.worker import perform
from mlxlora.bench.workloads import WORKLOADS, typical_sizes, updates_of
from mlxlora.cli import app
from mlxlora.console import Screen
from mlxlora.data.render import Example
from mlxlora.errors import ConfigError, ModelError

TRAIN = Job(OURS, "tiny", "", bits=0, rank=4, workload="answers", batch=2, updates=2)
MODEL = Model("tiny", 106_944, "float32", 0, "a machine")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """On the CPU compiling means running g++; what is tested here does not depend on it."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")  # for the fresh processes
    mx.disable_compile()
    yield
    mx.enable_compile()


def trained(seconds: float, *, loss: float = 5.0, memory: int = 1000) -> Trained:
    return Trained(MODEL, (6.0, loss), seconds, memory, 40, 30, 10**9, 10**10)


def training(ours: list[Trained], theirs: list[Trained]) -> Training:
    return Training(TRAIN, "rows", {MLX_LM: tuple(theirs), OURS: tuple(ours)})


@pytest.mark.slow
def test_a_comparison_in_fresh_processes_ends_in_one_json_object():
    words = ["bench", "--shape", "tiny", "--rounds", "1", "--batch", "2", "--updates", "2"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["model"], found["rounds"], found["against"]) == ("tiny", 1, "mlx-lm")
    (train,) = found["training"]
    assert train["loss_difference"] < 1e-5
    assert len(train["losses"]["mlxlora"]) == len(train["losses"]["mlx-lm"]) == 4
    keys = {"tokens_per_second", "seconds_per_update", "peak_memory", "share_of_limit"}
    for side in ("mlxlora", "mlx-lm"):
        assert train[side].keys() == keys
        assert all(value > 0 for value in train[side].values())
        seconds = train["updates"] * train[side]["seconds_per_update"]
        assert train[side]["tokens_per_second"] * seconds == pytest.approx(
            train["supervised_tokens"]
        )
    speed = train["ratios"]["tokens_per_second"]
    assert speed["least"] <= speed["median"] <= speed["most"]
    assert found["decoding"]["same_tokens"] and found["decoding"]["tokens"] == 64


def test_both_sides_learn_the_same():
    losses = [perform(dataclasses.replace(TRAIN, side=side)).losses for side in (OURS, MLX_LM)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]  # the second pass over the same rows


def test_both_sides_train_a_quantized_base():
    job = dataclasses.replace(TRAIN, bits=4)
    losses = [perform(dataclasses.replace(job, side=side)).losses for side in (OURS, MLX_LM)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_model_directory_can_be_measured(dense_path):
    job = dataclasses.replace(TRAIN, shape="", path=str(dense_path))
    found = perform(job)
    assert found.model.name == "dense" and math.isfinite(found.losses[0])
    assert len(perform(dataclasses.replace(job, workload="")).tokens) == 64


@pytest.mark.parametrize("name", ["answers", "mixed", "long"])
def test_mlx_lm_is_given_exactly_the_tokens_that_are_supervised(name):
    update = updates_of(name, 2, 1, 512)[0]
    tokens, spans = _padded(update, WORKLOADS[name].longest)
    assert (tokens.shape[1] - 1) % 32 == 0 or tokens.shape[1] == WORKLOADS[name].longest

    def flat(inputs: mx.array) -> mx.array:
        return mx.zeros((*inputs.shape, 512))

    loss, count = default_loss(flat, tokens, spans)
    assert count.item() == sum(example.supervised for example in update)
    assert loss.item() == pytest.approx(math.log(512), rel=1e-4)


def test_the_workloads_are_as_they_are_described():
    def lengths(name: str) -> tuple[np.ndarray, np.ndarray]:
        rows = [example for (example,) in updates_of(name, 1, 2000, 10)]
        total = np.array([len(example.tokens) for example in rows])
        return total, np.array([example.supervised for example in rows])

    total, answers = lengths("answers")
    assert np.mean(answers) == pytest.approx(106, rel=0.05)
    assert np.mean(total - answers) == pytest.approx(75, rel=0.05)
    total, answers = lengths("mixed")
    assert total.min() >= 32 and total.max() == 2048
    assert 250 < np.median(total) < 350 and np.mean(total) > 1.3 * np.median(total)
    share = answers / total
    assert share.min() > 0.2 and share.max() < 0.8
    (row,) = updates_of("long", 1, 1, 10)[0]
    assert len(row.tokens) == 4096 and row.supervised == 4095
    assert max(length for length, _ in typical_sizes("mixed")) == 2047


def test_rows_and_weights_are_the_same_every_time():
    one, two = (updates_of("mixed", 4, 2, 100) for _ in range(2))
    assert [len(update) for update in one] == [4, 4]
    for a, b in zip(chain(*one), chain(*two), strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.mask, b.mask)
    first, second = (dict(tree_flatten(build(SHAPES["tiny"], 4).parameters())) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]) for name in first)


def test_packed_weights_count_as_if_they_were_not():
    assert weight_count(build(SHAPES["tiny"], 4)) == weight_count(build(SHAPES["tiny"], 0))


def test_operations_are_those_counted_by_hand():
    config = {
        "model_type": "qwen3",
        "hidden_size": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "vocab_size": 10,
    }
    # five tokens: four predictions, of which two are trained; 1 + 2 + 3 + 4 pairs attend
    row = Example(0, np.zeros(5, np.int32), np.array([False, False, False, True, True]))
    frozen = 2 * 2 * (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8) * 4
    low_rank = 6 * 5 * (8 + 6 + 6 + 8 + 3 * 12) * 4
    attention = 6 * 2 * (2 * 2) * 10
    head = 2 * 2 * 4 * 10 * 2
    assert operations(config, 5, [row]) == 3 * (frozen + low_rank + attention) + head == 31_712
    assert operations({**config, "model_type": "qwen3_moe"}, 5, [row]) == 0
    assert matrix_rate(mx.float32) > 1e8


def test_a_ratio_is_taken_within_its_round():
    result = training([trained(1.0), trained(4.0), trained(1.0)], [trained(2.0)] * 2 + [trained(3)])
    speed, *_ = result.figures()
    assert speed.values == {MLX_LM: 15.0, OURS: 30.0}
    assert speed.ratio is not None
    assert (speed.ratio.median, speed.ratio.least, speed.ratio.most) == (2.0, 0.5, 3.0)
    assert result.one.share_of_limit == pytest.approx(0.1)


@pytest.mark.parametrize("loss", [5.01, math.nan])
def test_no_speed_is_reported_when_the_losses_differ(loss):
    agree(training([trained(1.0)], [trained(1.0)]))
    with pytest.raises(BenchError, match=r"did not do the same work(.|\n)*update 2.*mlx-lm 5, "):
        agree(training([trained(1.0, loss=loss)], [trained(1.0)]))


def test_the_table_fits_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    both = training([trained(0.01, memory=10**9)] * 3, [trained(0.02, memory=2 * 10**9)] * 3)
    decoded = (Decoded(MODEL, (1, 2, 3), 0.5, 1000),) * 3
    report = Report(8, 3, MLX_LM, (both,), Decoding({MLX_LM: decoded, OURS: decoded}))
    show_bench(Screen(), report)
    shown = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    assert "mlxlora trains 2.00 times as fast as mlx-lm, with 0.50 times the memory." in shown
    assert "2.00 to 2.00" in shown
    unclear = training([trained(1.0), trained(3.0)], [trained(2.0)] * 2)
    show_bench(Screen(), Report(8, 2, MLX_LM, (unclear,), None))
    assert "mlxlora trains about as fast as mlx-lm" in capsys.readouterr().out
    alone = Report(8, 3, "none", (Training(TRAIN, "rows", {OURS: (trained(1.0),)}),), None)
    show_bench(Screen(), alone)
    assert "mlx-lm" not in capsys.readouterr().out


def test_a_process_that_fails_is_told_with_its_last_words():
    with pytest.raises(BenchError, match=r"mlxlora, decoding failed \(exit code 1\)(.|\n)*KeyErr"):
        run(dataclasses.replace(TRAIN, shape="no such shape", workload=""))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (Options(shape="huge"), "--shape must be tiny, mini, small, qwen3-0.6b, .* not 'huge'"),
        (Options(workloads=("answers", "odd")), "--workload must be answers, mixed or long"),
        (Options(against="x"), "--against must be mlx-lm or none, not 'x'"),
        (Options(bits=5), "--bits must be 0, 4 or 8, not 5"),
        (Options(train=False, decode=False), "leave nothing to measure"),
    ],
)
def test_a_wrong_option_is_answered_with_the_right_ones(options, text):
    with pytest.raises(ConfigError, match=text):
        check(options)


def test_a_model_is_looked_at_before_anything_starts(tmp_path, quantized_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        bench(Options(model=str(tmp_path)), lambda *_: None)
    with pytest.raises(ConfigError, match="quantized already"):
        bench(Options(model=str(quantized_path), bits=4), lambda *_: None)
    with pytest.raises(ConfigError, match="give one of them"):
        CliRunner().invoke(
            app, ["bench", "--model", "m", "--shape", "tiny"], catch_exceptions=False
        )
