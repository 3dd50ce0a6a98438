from functools import partial

import mlx.core as mx
import pytest
from conftest import randomized
from memory import peak
from mlx.utils import tree_flatten
from test_forward import EXAMPLES
from zoo import FAMILIES, model_of

from mlxlora.config import LoraConfig
from mlxlora.data.batches import pack, pad
from mlxlora.lora.fresh import new_layers
from mlxlora.train.attention import attention
from mlxlora.train.forward import Forward, arrays
from mlxlora.train.objectives import sft
from mlxlora.train.recompute import recomputed_blocks, trained_blocks


def gradients(model, batch, checkpoint):
    forward = Forward(model)
    forward.checkpoint_blocks = checkpoint
    inputs, positions, targets, weights = arrays(batch)

    def loss(parameters):
        model.update(parameters)
        return sft(forward(inputs, positions, targets, ends=batch.ends, gradient=True), weights)

    parameters = model.trainable_parameters()
    value, found = mx.value_and_grad(loss)(parameters)
    mx.eval(value, found)
    model.update(parameters)
    return {"loss": value, **dict(tree_flatten(found))}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradients_are_the_same_bit_for_bit_dropout_included(family):
    model = model_of(family)
    new_layers(model, LoraConfig(rank=4, dropout=0.5), 0)
    randomized(model)
    model.train()
    batch = pack(EXAMPLES) if Forward(model).packs else pad(EXAMPLES)
    plain, again = (gradients(model, batch, checkpoint) for checkpoint in (False, True))
    assert plain.keys() == again.keys()
    for name, wanted in plain.items():
        assert mx.abs(wanted).max() > 0, name
        assert mx.array_equal(again[name], wanted), name


@pytest.mark.parametrize(
    "lora",
    [{"method": "dora"}, {"method": "pissa"}, {"train_also": ("*norm*", "embed_tokens")}],
    ids=str,
)
def test_they_are_the_same_with_every_kind_of_trained_array(lora):
    model = model_of("qwen3")
    new_layers(model, LoraConfig(rank=4, dropout=0.5, **lora), 0)
    randomized(model)
    model.train()
    plain, again = (gradients(model, pack(EXAMPLES), checkpoint) for checkpoint in (False, True))
    assert plain.keys() == again.keys()
    assert all(mx.array_equal(again[name], wanted) for name, wanted in plain.items())


def test_every_class_of_block_is_checkpointed_and_put_back():
    model = model_of("qwen3")
    kind = type(model.layers[1])

    class Other(kind):
        def __call__(self, *args, **options):
            return super().__call__(*args, **options)

    class Inheriting(kind):
        pass

    new_layers(model, LoraConfig(rank=4), 0)
    randomized(model)
    wanted = gradients(model, pack(EXAMPLES), False)
    for changed in (Other, Inheriting):
        model.layers[1].__class__ = changed
        before = {k: k.__dict__.get("__call__") for k in (kind, changed)}
        found = gradients(model, pack(EXAMPLES), True)
        assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)
        with pytest.raises(RuntimeError), recomputed_blocks(model):
            assert all(k.__dict__["__call__"] is not own for k, own in before.items())
            raise RuntimeError
        assert {k: k.__dict__.get("__call__") for k in (kind, changed)} == before


def test_what_is_trained_below_the_blocks_makes_all_of_them_differentiated():
    model = model_of("qwen3")
    new_layers(model, LoraConfig(rank=4, targets=("embed_tokens", "layers.1.mlp.up_proj")), 0)
    assert len(trained_blocks(model)) == 2
    new_layers(model, LoraConfig(rank=4, targets=("layers.1.mlp.up_proj",)), 0)
    assert len(trained_blocks(model)) == 1


def test_memory_falls_and_attention_stays_lean_in_the_second_pass(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "mlxlora.train.packing.attention", lambda *a: calls.append(1) or attention(*a)
    )
    model = model_of("llama", num_hidden_layers=8)
    new_layers(model, LoraConfig(rank=4), 0)
    batch = pack(EXAMPLES * 12)
    peaks = []
    for checkpoint in (False, True):
        gradients(model, batch, checkpoint)
        calls.clear()
        peaks.append(peak(partial(gradients, model, batch, checkpoint)))
    assert peaks[1] < 0.5 * peaks[0]
    # In the look at the model (three forward passes), forward, and again backward.
    assert len(calls) >= (3 + 2) * len(model.layers)


def test_blocks_below_the_lowest_adapter_are_not_stored():
    model = model_of("llama", num_hidden_layers=8)
    peaks = []
    for blocks in (0, 1):
        new_layers(model, LoraConfig(rank=4, blocks=blocks), 0)
        assert len(trained_blocks(model)) == (blocks or 8)
        batch = pack(EXAMPLES * 12)
        gradients(model, batch, False)
        peaks.append(peak(partial(gradients, model, batch, False)))
    assert peaks[1] < 0.4 * peaks[0]
