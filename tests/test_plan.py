from functools import partial

import pytest
from conftest import randomized
from memory import peak
from test_batches import example
from test_recompute import gradients
from zoo import model_of

from mlxlora.config import LoraConfig
from mlxlora.data.batches import pack
from mlxlora.lora.fresh import new_layers
from mlxlora.plan import plan_memory
from mlxlora.train.recompute import trained_blocks

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64}


def measured(model, tokens: int, checkpoint: bool) -> int:
    batch = pack([example(65, start=60)] * (tokens // 64))
    gradients(model, batch, checkpoint)
    return peak(partial(gradients, model, batch, checkpoint))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "cohere"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_bytes_of_a_token_are_about_what_is_measured(family, checkpoint):
    model = model_of(family, **SIZES)
    new_layers(model, LoraConfig(rank=8), 0)
    randomized(model)
    plan = plan_memory(model, trained_blocks(model))
    few, many = (measured(model, tokens, checkpoint) for tokens in (256, 1024))
    per_token = (many - few) / (1024 - 256)
    assert 0.6 < (plan.peak(2, checkpoint) - plan.peak(1, checkpoint)) / per_token < 1.6


def test_only_blocks_that_are_differentiated_count():
    model = model_of("llama", **SIZES)
    plans = []
    for blocks in (0, 2):
        new_layers(model, LoraConfig(rank=8, blocks=blocks), 0)
        plans.append(plan_memory(model, trained_blocks(model)))
    assert plans[1].per_token == plans[0].per_token * 2 // 6


def test_whole_logits_are_in_the_plan():
    model = model_of("llama", **SIZES)
    new_layers(model, LoraConfig(rank=8), 0)
    plain, whole = (plan_memory(model, trained_blocks(model), n) for n in (0, 32_000))
    assert whole.per_token - plain.per_token == 14 * 32_000
