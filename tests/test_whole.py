"""Modules trained whole beside low-rank layers: new tokens, heads, norms."""

import json

import mlx.core as mx
import pytest
from conftest import randomized, worst
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load

from mlxlora.base import load
from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError, ConfigError
from mlxlora.export.fuse import fuse
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach, detach
from mlxlora.lora.fresh import collect, new_layers

TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])
ALSO = ("embed_tokens", "*norm*")


def moved(base, also=ALSO) -> LoraConfig:
    config = LoraConfig(rank=4, targets=("q_proj",), train_also=also)
    new_layers(base.model, config, 0)
    randomized(base.model)
    changed = {
        name: array + 0.05 * mx.random.normal(array.shape, key=mx.random.key(7))
        for name, array in tree_flatten(base.model.trainable_parameters())
        if "lora_" not in name
    }
    base.model.load_weights(list(changed.items()), strict=False)
    return config


def test_matching_modules_are_trained_in_float32_beside_the_factors(quantized):
    new_layers(quantized.model, LoraConfig(targets=("q_proj",), train_also=ALSO), 0)
    trained = dict(tree_flatten(quantized.model.trainable_parameters()))
    whole = {name: array for name, array in trained.items() if "lora_" not in name}
    assert "model.embed_tokens.weight" in whole
    assert whole["model.embed_tokens.weight"].shape == (259, 64)
    assert {"model.norm.weight", "model.layers.0.self_attn.q_norm.weight"} <= whole.keys()
    assert len(whole) == 1 + 1 + 2 * 4
    assert {array.dtype for array in trained.values()} == {mx.float32}


def test_answers_stay_in_the_model_s_type(dense):
    dense.model.set_dtype(mx.bfloat16)
    new_layers(dense.model, LoraConfig(train_also=("embed_tokens", "norm")), 0)
    assert dense.model.model.embed_tokens(TOKENS).dtype == mx.bfloat16
    assert dense.model.model(TOKENS).dtype == mx.bfloat16


@pytest.mark.parametrize("name", ["dense", "quantized", "experts"])
def test_saved_attached_and_fused_it_is_the_same_model(name, request, tmp_path):
    base = request.getfixturevalue(name)
    own = dict(tree_flatten(base.model.parameters()))
    before = base.model(TOKENS)
    config = moved(base)
    logits = base.model(TOKENS)
    adapter = collect(base.model, config, {"base": base.identity.to_dict()})
    adapter.save(tmp_path / "a")
    detach(base.model)
    after = dict(tree_flatten(base.model.parameters()))
    assert own.keys() == after.keys()
    assert all(own[name] is after[name] for name in own)
    assert mx.array_equal(base.model(TOKENS), before)
    loaded = Adapter.load(tmp_path / "a")
    assert loaded.modules == adapter.modules
    assert loaded.whole.keys() == adapter.whole.keys()
    attach(base, loaded)
    assert worst(base.model(TOKENS), logits) < 2e-5
    detach(base.model)
    assert all(own[n] is a for n, a in tree_flatten(base.model.parameters()))
    done = fuse(base.path, loaded, tmp_path / "fused", "none")
    assert done.layers == 2
    assert worst(load(tmp_path / "fused").model(TOKENS), logits) < 1e-4


def test_over_a_quantized_base_what_was_trained_whole_is_fused_at_more_bits(quantized, tmp_path):
    config = moved(quantized)
    logits = quantized.model(TOKENS)
    adapter = collect(quantized.model, config, {})
    fuse(quantized.path, adapter, tmp_path / "fused", 8, proof=None)
    settings = json.loads((tmp_path / "fused" / "config.json").read_text())["quantization"]
    assert settings["model.embed_tokens"]["bits"] == 8
    assert worst(load(tmp_path / "fused").model(TOKENS), logits) < 2e-2


def test_mlx_lm_refuses_rather_than_ignores_what_it_cannot_load(dense, tmp_path):
    collect(dense.model, moved(dense), {}).save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: not an adapter parameter"):
        mlx_lm_load(str(dense.path), adapter_path=str(tmp_path / "a"))


def test_weights_that_the_config_does_not_list_are_refused(dense, tmp_path):
    collect(dense.model, moved(dense, ("norm",)), {}).save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "model.norm" in config.pop("modules_to_save")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"'model.*norm\.weight', not a LoRA tensor"):
        Adapter.load(tmp_path / "a")


@pytest.mark.parametrize(
    "lora, says",
    [
        ({"train_also": ("nothing",)}, "train_also: 'nothing' matches no module.*it has .*norm"),
        ({"train_also": ("self_attn",)}, "'self_attn' matches no module"),
        ({"targets": ("q_proj",), "train_also": ("q_proj",)}, "trained whole or by low-rank"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(dense, lora, says):
    with pytest.raises(ConfigError, match=says):
        new_layers(dense.model, LoraConfig(**lora), 0)


def test_what_is_trained_whole_gets_no_low_rank_layer(dense):
    paths = new_layers(dense.model, LoraConfig(train_also=("q_proj",)), 0)
    assert not any(path.endswith("q_proj") for path in paths)
    assert any(path.endswith("k_proj") for path in paths)
