import mlx.core as mx
import pytest
from conftest import randomized, worst
from memory import held

from mlxlora.base import load, open_base
from mlxlora.config import LoraConfig
from mlxlora.export.streamed import logits_at
from mlxlora.lora.attach import attach
from mlxlora.lora.fresh import collect, new_layers

INPUTS = mx.array([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
PLACES = mx.array([0, 4, 7])


@pytest.mark.parametrize("kind", ["dense_path", "quantized_path", "experts_path"])
def test_it_is_the_models_own_logits_at_those_places(kind, request):
    path = request.getfixturevalue(kind)
    wanted = load(path).model(INPUTS).reshape(10, -1)[PLACES]
    assert worst(logits_at(lambda: open_base(path).model, INPUTS, PLACES), wanted) < 1e-5


def test_adapters_act_on_every_layer_head_included(quantized_path):
    config = LoraConfig(rank=4, targets=("all-linear", "embed_tokens"))
    base = load(quantized_path)
    new_layers(base.model, config, 0)
    randomized(base.model)
    wanted = base.model(INPUTS).reshape(10, -1)[PLACES]
    adapter = collect(base.model, config, {})

    def opened():
        model = open_base(quantized_path).model
        attach(model, adapter)
        return model

    assert worst(logits_at(opened, INPUTS, PLACES), wanted) < 1e-5


def test_places_are_chosen_once(dense_path):
    """One row, and as many places as it has tokens, in another order."""
    config = LoraConfig(rank=4, targets=("embed_tokens",))
    base = load(dense_path)
    new_layers(base.model, config, 0)
    adapter = collect(base.model, config, {})
    places = mx.array([4, 3, 2, 1, 0])

    def opened():
        model = open_base(dense_path).model
        attach(model, adapter)
        return model

    wanted = load(dense_path).model(INPUTS[:1])[0][places]
    assert worst(logits_at(opened, INPUTS[:1], places), wanted) < 1e-5


def test_blocks_let_go_of_their_weights(dense_path):
    total = sum(a.nbytes for a in mx.load(str(dense_path / "model.safetensors")).values())
    block = total // 3
    before = held()
    models = []

    def opened():
        models.append(open_base(dense_path).model)
        return models[-1]

    logits_at(opened, INPUTS, PLACES)
    assert held() - before < block
    assert all(
        a.size == 1
        for _, a in models[0].layers[0].named_modules()
        for a in a.values()
        if isinstance(a, mx.array)
    )


def test_a_block_that_is_run_twice_keeps_its_weights(dense_path):
    opened = []

    def looped():
        model = open_base(dense_path).model
        model.model.layers = [*model.model.layers, model.model.layers[0]]
        opened.append(model)
        return model

    wanted = looped()(INPUTS).reshape(10, -1)[PLACES]
    opened.clear()
    assert worst(logits_at(looped, INPUTS, PLACES), wanted) < 1e-5
    assert len(opened) == 2


def test_others_answer_for_a_module(dense_path):
    seen = []

    def around(module, own, x):
        seen.append(x.shape)
        return own(x) * 0

    path = "model.layers.1.mlp.down_proj"
    silent = logits_at(lambda: open_base(dense_path).model, INPUTS, PLACES, {path: around})
    assert seen == [(2, 5, 128)]
    assert worst(silent, logits_at(lambda: open_base(dense_path).model, INPUTS, PLACES)) > 1e-3
