import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import randomized, worst
from mlx.utils import tree_flatten

from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError, ConfigError
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, attached, detach, low_rank_layers, switch
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.lora.targets import targets

TOKENS = mx.array([[1, 2, 3, 4, 5]])


def adapter_of(base, **lora) -> Adapter:
    config = LoraConfig(**lora)
    new_layers(base.model, config, 0)
    randomized(base.model)
    return collect(base.model, config, {"base": base.identity.to_dict()})


@pytest.mark.parametrize("name", ["dense", "quantized", "experts"])
def test_detach_restores_the_base_exactly(name, request):
    base = request.getfixturevalue(name)
    before = dict(tree_flatten(base.model.parameters()))
    classes = [(path, type(m)) for path, m in base.model.named_modules()]
    logits = base.model(TOKENS)
    adapter_of(base)
    assert worst(base.model(TOKENS), logits) > 1e-3
    detach(base.model)
    after = dict(tree_flatten(base.model.parameters()))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert [(path, type(m)) for path, m in base.model.named_modules()] == classes
    assert mx.array_equal(base.model(TOKENS), logits)


def test_attach_gives_back_what_was_collected(dense):
    adapter = adapter_of(dense)
    logits = dense.model(TOKENS)
    detach(dense.model)
    attach(dense, adapter)
    assert mx.array_equal(dense.model(TOKENS), logits)


def test_several_adapters_switch_without_reading_or_making_anything(dense, tmp_path, monkeypatch):
    lora = ({}, {"method": "dora", "rank": 2}, {"train_also": ("norm", "embed_tokens")})
    adapters, logits = {}, {None: dense.model(TOKENS)}
    before = dict(tree_flatten(dense.model.parameters()))
    for number, options in enumerate(lora):
        adapters[f"n{number}"] = adapter_of(dense, **options)
        logits[f"n{number}"] = dense.model(TOKENS)
        detach(dense)
    for name, adapter in adapters.items():
        adapters[name] = Adapter.load(adapter.save(tmp_path / name))
    attach(dense, adapters)
    mx.eval(dense.model(TOKENS))
    assert attached(dense) == (("n0", "n1", "n2"), "n0")
    modules = {}
    for name in ("n0", "n1", None, "n2", "n1", "n0", "n2", None):
        switch(dense, name)
        assert attached(dense)[1] == name
        assert worst(dense.model(TOKENS), logits[name]) < 1e-5
        ours = [id(module) for module in dense.model.modules()]
        assert modules.setdefault(name, ours) == ours  # the very same objects again
    for name in adapters:
        shutil.rmtree(tmp_path / name)
    with monkeypatch.context() as patch:  # no walk through the model either
        patch.setattr(nn.Module, "apply_to_modules", None)
        switch(dense, "n2")
        switch(dense, "n0")
    assert worst(dense.model(TOKENS), logits["n0"]) < 1e-5
    detach(dense)
    after = dict(tree_flatten(dense.model.parameters()))
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert attached(dense) == ((), None)


def test_a_name_that_is_not_attached_is_refused_and_the_one_that_acts_stays(dense):
    adapter = adapter_of(dense)
    logits = dense.model(TOKENS)
    attach(dense, {"a": adapter})
    with pytest.raises(AdapterError, match="no adapter 'b' is attached; attached: a"):
        switch(dense, "b")
    assert worst(dense.model(TOKENS), logits) < 1e-6


def test_all_linear_takes_experts_but_no_router_embedding_or_head(experts):
    paths = targets(experts.model, LoraConfig())
    assert "model.layers.0.mlp.switch_mlp.gate_proj" in paths
    assert not any(p.endswith((".gate", "embed_tokens", "lm_head")) for p in paths)
    assert len(paths) == 2 * 7


@pytest.mark.parametrize(
    "lora, count",
    [
        ({"targets": ("q_proj", "v_proj")}, 4),
        ({"targets": ("*.mlp.*",)}, 6),
        ({"targets": ("embed_tokens",)}, 1),
        ({"blocks": 1}, 7),
        ({"blocks": (0,), "targets": ("q_proj",)}, 1),
    ],
)
def test_targets_and_blocks_choose(dense, lora, count):
    assert len(targets(dense.model, LoraConfig(**lora))) == count


@pytest.mark.parametrize(
    "lora, says",
    [
        ({"targets": ("w_proj",)}, "'w_proj' matches no module of this model; it has .*q_proj"),
        ({"blocks": 3}, "this model has 2 blocks"),
        ({"blocks": (0, 5)}, "0 to 1"),
        ({"rank_pattern": {"nope": 3}}, "matches no adapted module"),
    ],
)
def test_targets_that_match_nothing_are_refused(dense, lora, says):
    with pytest.raises(ConfigError, match=says):
        new_layers(dense.model, LoraConfig(**lora), 0)


def test_the_last_blocks_are_numbered_past_nine(dense):
    from mlxlora.lora.attach import natural

    assert sorted(["a.10.x", "a.9.x", "a.2.x"], key=natural) == ["a.2.x", "a.9.x", "a.10.x"]


def test_patterns_set_rank_and_alpha_and_the_saved_adapter_is_the_same_function(dense):
    lora = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"*.mlp.*": 64.0}}
    adapter = adapter_of(dense, **lora)
    ranks = {path: (layer.rank, layer.scale) for path, layer in low_rank_layers(dense.model)}
    assert ranks["model.layers.0.self_attn.q_proj"] == (4, 8.0)
    assert ranks["model.layers.0.mlp.up_proj"] == (16, 4.0)
    logits = dense.model(TOKENS)
    attach(dense, adapter)
    assert worst(dense.model(TOKENS), logits) < 1e-5


def test_only_the_factors_are_trained(dense):
    adapter_of(dense, dropout=0.1)
    names = {
        name.rpartition(".")[2] for name, _ in tree_flatten(dense.model.trainable_parameters())
    }
    assert names == {"lora_a", "lora_b"}


def test_initial_weights_depend_on_the_seed_only(dense):
    def first(seed):
        detach(dense.model)
        new_layers(dense.model, LoraConfig(), seed)
        return next(low_rank_layers(dense.model))[1].lora_a

    a, b, c = first(0), first(0), first(1)
    assert mx.array_equal(a, b)
    assert not mx.array_equal(a, c)


def test_an_adapter_that_does_not_fit_names_every_tensor(dense, experts):
    adapter = adapter_of(dense)
    detach(dense.model)
    with pytest.raises(AdapterError) as error:
        attach(experts.model, adapter)
    assert "model.layers.0.mlp.gate_proj: the base has no such layer" in str(error.value)
    assert not list(low_rank_layers(experts.model))
    weights = dict(adapter.weights)
    weights["model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((32, 16))
    with pytest.raises(AdapterError, match=r"q_proj.lora_a: adapter \(32, 16\), base \(64, 16\)"):
        attach(dense, Adapter("lora", weights, 16, 2.0))


def test_another_base_is_refused_with_what_differs_unless_forced(dense, quantized):
    adapter = adapter_of(dense)
    with pytest.raises(AdapterError) as error:
        attach(quantized, adapter)
    assert "quantization: trained on none, this base has 4 bits" in str(error.value)
    attach(quantized, adapter, force=True)
    assert len(list(low_rank_layers(quantized.model))) == 14


def test_routers_are_never_adapted_wherever_their_layer_stands():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(8, 8)
            self.gate_proj = nn.Linear(8, 8)
            self.gate = nn.Linear(8, 8)
            self.router = nn.Module()
            self.router.layer = nn.Linear(8, 8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block()]

    found = targets(Model(), LoraConfig())
    assert found == ["layers.0.gate_proj", "layers.0.q_proj"]


@pytest.mark.parametrize("sets", [False, True])
def test_a_layer_whose_weight_the_model_takes_itself_is_left_alone(sets):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(8, 8)
            self.mix = nn.Linear(8, 8)

        def __call__(self, x):
            if sets:
                self.mix.weight = mx.clip(self.mix.weight, -1, 1)
                return self.q_proj(self.mix(x))
            return self.q_proj(x) @ self.mix.weight

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block()]

        def __call__(self, tokens):
            return self.layers[0](mx.ones((*tokens.shape, 8)))

    model = Model()
    weight = model.layers[0].mix.weight
    model.eval()
    assert targets(model, LoraConfig()) == ["layers.0.q_proj"]
    assert model.layers[0].mix.weight is weight and not model.training
    with pytest.raises(ConfigError, match=r"'mix' matches layers.0.mix, whose weight the model"):
        targets(model, LoraConfig(targets=("mix",)))
