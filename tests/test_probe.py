"""Predictions beside MLX's own record of the same step."""

import pytest
from conftest import randomized
from memory import peak
from zoo import model_of

from mlxlora.base import training_mode
from mlxlora.config import LoraConfig, TrainConfig
from mlxlora.data.layout import Layout
from mlxlora.lora.fresh import new_layers, prepare_full
from mlxlora.quantized import use_own_products
from mlxlora.train.forward import Forward
from mlxlora.train.optim import make_optimizer
from mlxlora.train.probe import Prober, cut
from mlxlora.train.step import Stepper
from mlxlora.train.thin import zeros

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "head_dim": 32}
ROWS = [(200, 100), (60, 30), (150, 150), (90, 20)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """As in a large case: many blocks of logits and tiles of attention."""
    for module in ("train.logprobs", "train.attention"):
        monkeypatch.setattr(f"mlxlora.{module}.block_bytes", lambda: 1 << 20)


def measured(model, forward, batches) -> int:
    with training_mode(model):
        stepper = Stepper(model, make_optimizer(TrainConfig()), 1.0, forward)
        stepper.step(tuple(batches), 0, 1, 0.0)
        return peak(lambda: stepper.step(tuple(batches), 0, 2, 0.0))


def ready(family: str, **changes):
    model = model_of(family, **SIZES, vocab_size=20_000, **changes)
    new_layers(model, LoraConfig(rank=8), 0)
    randomized(model)
    return model


@pytest.mark.parametrize("family", ["llama", "cohere2", "gpt_oss"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("tokens", [250, 1000])
def test_a_probe_tells_what_a_step_holds(family, checkpoint, tokens):
    model = ready(family)
    forward = Forward(model)
    layout = Layout(tokens, packed=forward.packs)
    need = Prober(model, forward, TrainConfig())(ROWS, layout, checkpoint)
    forward.checkpoint_blocks = checkpoint
    # At 10 MB it shows that the probe takes an update's largest micro-batch for all of them.
    assert need.bytes == pytest.approx(measured(model, forward, cut(ROWS, layout)), rel=0.2)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_zeros_tell_what_weights_tell(method):
    model = model_of("llama", **SIZES, vocab_size=5000, tie_word_embeddings=True)
    new_layers(model, LoraConfig(rank=8), 0) if method == "lora" else prepare_full(model)
    forward, layout = Forward(model), Layout(1000, packed=True)
    needs = [Prober(model, forward, TrainConfig(), f)(ROWS, layout, False) for f in (None, zeros)]
    assert needs[0].bytes == pytest.approx(needs[1].bytes, rel=0.05)
    assert needs[0].bytes == pytest.approx(measured(model, forward, cut(ROWS, layout)), rel=0.15)


def test_quantized_blocks_that_are_widened_in_turn():
    import mlx.nn as nn

    model = model_of("qwen3", **SIZES, vocab_size=2000, tie_word_embeddings=True)
    nn.quantize(model, 32, 4)
    model.freeze()
    use_own_products(model)
    new_layers(model, LoraConfig(rank=8), 0)
    forward, layout = Forward(model), Layout(1000, packed=True)
    need = Prober(model, forward, TrainConfig(), zeros)(ROWS, layout, False)
    assert need.bytes == pytest.approx(measured(model, forward, cut(ROWS, layout)), rel=0.15)


def test_only_blocks_that_are_differentiated_keep_activations():
    model = model_of("llama", **SIZES)
    layout = Layout(1000, packed=True)
    kept = []
    for blocks in (6, 2, 1):
        new_layers(model, LoraConfig(rank=8, blocks=blocks), 0)
        need = Prober(model, Forward(model), TrainConfig())(ROWS, layout, False)
        kept.append(need.activations)
    assert kept[0] == pytest.approx(3 * kept[1], rel=0.1)
    assert kept[1] == pytest.approx(2 * kept[2], rel=0.1)


def test_a_micro_batch_that_takes_too_long_is_told_by_a_smaller_one(monkeypatch):
    model = ready("llama")
    forward, layout = Forward(model), Layout(2000, packed=True)
    rows = ROWS * 4
    whole = Prober(model, forward, TrainConfig())(rows, layout, False)
    monkeypatch.setattr("mlxlora.train.probe.CPU_TOKENS", 512)
    part = Prober(model, forward, TrainConfig())(rows, layout, False)
    assert part.tokens == whole.tokens
    assert part.bytes == pytest.approx(whole.bytes, rel=0.1)
