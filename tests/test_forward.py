import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import randomized
from losses import agree, examples, of_batch, of_rows
from mlx.utils import tree_flatten
from zoo import FAMILIES, model_of

from mlxlora.config import LoraConfig
from mlxlora.data.batches import pack, pad
from mlxlora.lora.fresh import new_layers
from mlxlora.lora.methods import METHODS
from mlxlora.train.attention import Spans
from mlxlora.train.forward import PADDED, WHOLE_LOGITS, Forward
from mlxlora.train.packing import RowCache, lean_attention, position_limit

EXAMPLES = examples(6, 18, 31)
UNPACKED = {"gpt2", "mamba", "gemma2"}  # positions, recurrence, attention of its own


def adapted(family: str, *targets: str) -> nn.Module:
    model = model_of(family)
    new_layers(model, LoraConfig(rank=4, targets=targets or ("all-linear",)), 0)
    randomized(model)
    return model


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in UNPACKED])
def test_packed_loss_and_gradients_are_those_of_every_row_alone(family):
    model = adapted(family)
    reference = of_rows(model, EXAMPLES)
    agree(of_batch(model, pack(EXAMPLES)), reference)
    agree(of_batch(model, pack(EXAMPLES, (1, 64, 40), reach=32)), reference)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_padded_loss_and_gradients_are_those_of_every_row_alone(family):
    model = adapted(family)
    agree(of_batch(model, pad(EXAMPLES)), of_rows(model, EXAMPLES))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    "lora",
    [
        *({"method": method} for method in METHODS),
        {"train_also": ("*norm*",)},
        {"train_also": ("embed_tokens",), "method": "dora"},
    ],
    ids=str,
)
def test_every_method_has_the_loss_and_gradients_of_every_row_alone(family, lora):
    model = model_of(family)
    new_layers(model, LoraConfig(rank=4, alpha=4.0, **lora), 0)
    randomized(model)
    batch = (pack if Forward(model).packs else pad)(EXAMPLES)
    ours, reference = of_batch(model, batch), of_rows(model, EXAMPLES)
    assert all(mx.abs(gradient).max() > 0 for gradient in reference[1].values())
    agree(ours, reference)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_head_comes_apart_and_only_attention_with_relative_positions_packs(family):
    forward = Forward(model_of(family))
    assert forward.head is not None
    assert forward.packs == (family not in UNPACKED)
    assert forward.notes == (() if forward.packs else (PADDED,))


def test_looking_at_a_model_leaves_it_as_it_was():
    model = model_of("gemma2")
    before = {path: id(module) for path, module in model.named_modules()}
    names = [name for name, _ in tree_flatten(model.parameters())]
    attention = mx.fast.scaled_dot_product_attention
    Forward(model)
    assert {path: id(module) for path, module in model.named_modules()} == before
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert mx.fast.scaled_dot_product_attention is attention


def test_attention_is_put_back_whatever_happens():
    attention = mx.fast.scaled_dot_product_attention
    with pytest.raises(RuntimeError), lean_attention([RowCache(Spans((3,)))]):
        assert mx.fast.scaled_dot_product_attention is not attention
        raise RuntimeError
    assert mx.fast.scaled_dot_product_attention is attention


@pytest.mark.parametrize(("family", "target"), [("llama", "lm_head"), ("qwen3", "embed_tokens")])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_trained_head_keeps_its_own_logits_and_says_so(family, target, fresh):
    model = model_of(family)
    new_layers(model, LoraConfig(rank=4, targets=(target, "q_proj")), 0)
    if not fresh:  # a fresh adapter changes nothing yet, and is trained all the same
        randomized(model)
    forward = Forward(model)
    assert forward.head is None and forward.notes == (WHOLE_LOGITS,)
    ours = of_batch(model, pack(EXAMPLES))
    agree(ours, of_rows(model, EXAMPLES))
    assert any(mx.abs(ours[1][name]).max() > 0 for name in ours[1] if target in name)


def test_a_model_is_looked_at_without_its_dropout():
    model = model_of("qwen3")
    new_layers(model, LoraConfig(rank=4, dropout=0.5), 0)
    randomized(model)
    model.train()
    assert Forward(model).packs and model.training


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_in_half_precision_models_come_apart_and_pack_too(family):
    model = model_of(family)
    model.set_dtype(mx.bfloat16)
    forward = Forward(model)
    assert forward.packs and forward.head is not None
    assert forward.head.scale == pytest.approx(1 / 7 if family == "granite" else 1, rel=1e-6)


def test_rows_are_packed_to_no_more_positions_than_the_model_was_made_for():
    assert position_limit(model_of("llama")) == 512
    assert position_limit(model_of("deepseek_v2")) == 256  # rope_scaling's original number
    assert position_limit(nn.Linear(2, 2)) is None


def test_a_head_that_does_something_unknown_is_left_alone():
    model = model_of("qwen3")

    class Odd(type(model)):
        def __call__(self, inputs, cache=None):
            return super().__call__(inputs, cache=cache) ** 3

    model.__class__ = Odd
    assert Forward(model).head is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_a_quantized_head_comes_apart_too(family, bits, mode):
    model = model_of(family)
    nn.quantize(model, group_size=32, bits=bits, mode=mode)
    new_layers(model, LoraConfig(rank=4), 0)
    randomized(model)
    forward = Forward(model)
    assert forward.head is not None
    agree(of_batch(model, (pack if forward.packs else pad)(EXAMPLES)), of_rows(model, EXAMPLES))
