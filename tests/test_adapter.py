import json

import mlx.core as mx
import pytest
from conftest import randomized, worst
from mlx_lm import load as mlx_lm_load

from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError, ExportError
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import attach
from mlxlora.lora.fresh import collect, new_layers

TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])


def saved(base, path, **lora):
    """An adapter on disk, and the logits with it attached."""
    config = LoraConfig(**lora)
    new_layers(base.model, config, 0)
    randomized(base.model)
    collect(base.model, config, {"base": base.identity.to_dict()}).save(path)
    return base.model(TOKENS)


@pytest.mark.parametrize("name", ["dense", "quantized", "experts"])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"targets": ("q_proj", "embed_tokens"), "rank": 3},
        {"blocks": (1,), "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 5.0}},
    ],
)
def test_mlx_lm_loads_our_directory_with_the_same_logits(name, lora, request, tmp_path):
    base = request.getfixturevalue(name)
    logits = saved(base, tmp_path / "a", **lora)
    model, _ = mlx_lm_load(str(base.path), adapter_path=str(tmp_path / "a"))
    assert worst(model(TOKENS), logits) < 2e-5


def test_we_load_mlx_lm_s_directory_with_the_same_logits(dense, tmp_path):
    """Written as mlx_lm.lora does: short keys, the last blocks, no provenance."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = mlx_lm_load(str(dense.path))
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    model.freeze()
    linear_to_lora_layers(model, 1, parameters)
    weights = {
        name: mx.random.normal(array.shape, key=mx.random.key(i)) * 0.1
        for i, (name, array) in enumerate(tree_flatten(model.trainable_parameters()))
    }
    model.load_weights(list(weights.items()), strict=False)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    attach(dense, Adapter.load(tmp_path))
    assert worst(dense.model(TOKENS), model(TOKENS)) < 1e-5


def test_saving_and_loading_is_equal(dense, tmp_path):
    saved(dense, tmp_path / "a")
    first = Adapter.load(tmp_path / "a")
    first.save(tmp_path / "b")
    second = Adapter.load(tmp_path / "b")
    assert first.weights.keys() == second.weights.keys()
    assert all(mx.array_equal(first.weights[k], second.weights[k]) for k in first.weights)
    assert (first.rank, first.scale, first.alpha) == (second.rank, second.scale, 32.0)
    assert first.provenance == second.provenance
    with pytest.raises(ExportError, match="exists already"):
        first.save(tmp_path / "b")


def test_changed_or_damaged_weights_are_refused(dense, tmp_path):
    saved(dense, tmp_path / "a")
    file = tmp_path / "a" / "adapters.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AdapterError, match="its hash differs"):
        Adapter.load(tmp_path / "a")
    file.write_bytes(whole[:-10])
    with pytest.raises(AdapterError, match="truncated"):
        Adapter.load(tmp_path / "a")
    file.unlink()
    with pytest.raises(AdapterError, match=r"has no adapters\.safetensors"):
        Adapter.load(tmp_path / "a")


def test_what_was_meant_instead_of_an_adapter_is_named(dense, tmp_path):
    saved(dense, tmp_path / "run" / "adapter")
    with pytest.raises(AdapterError, match=r"the one of this run is .*run/adapter$"):
        Adapter.load(tmp_path / "run")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "adapter_config.json").write_text("{}")
    (theirs / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"it is PEFT's: mlxlora adapter import .*theirs "):
        Adapter.load(theirs)


def test_directories_that_are_no_adapters_are_named(tmp_path):
    with pytest.raises(AdapterError, match="it does not exist"):
        Adapter.load(tmp_path / "none")
    with pytest.raises(AdapterError, match="not an adapter directory"):
        Adapter.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        Adapter.load(tmp_path)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"x.lora_a": mx.zeros((2, 2))})
    for config, says in (
        ({"fine_tune_type": "loha"}, "of type 'loha'; known are lora, dora, full"),
        ({"lora_parameters": {"rank": 2}}, r"no lora_parameters\.rank and \.scale"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(AdapterError, match=says):
            Adapter.load(tmp_path)
