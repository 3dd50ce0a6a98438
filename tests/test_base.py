"""Bases that cannot be loaded: each is one clear message."""

import json

import mlx.core as mx
import pytest

from mlxlora.base import load
from mlxlora.errors import ModelError


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def no_config(path):
    (path / "config.json").unlink()


def broken_config(path):
    (path / "config.json").write_text("{")


def no_type(path):
    (path / "config.json").write_text("{}")


def no_weights(path):
    (path / "model.safetensors").unlink()


def missing_shard(path):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def truncated(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def unknown_type(path):
    edit_config(path, model_type="martian")


def other_shape(path):
    edit_config(path, intermediate_size=96)


def missing_tensor(path):
    weights = mx.load(str(path / "model.safetensors"))
    mx.eval(weights)
    weights.pop("model.norm.weight")
    mx.save_safetensors(str(path / "model.safetensors"), weights)


def own_code(path):
    edit_config(path, model_file="model.py")
    (path / "model.py").write_text("raise SystemExit('ran')")


def no_tokenizer(path):
    (path / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    "damage, says",
    [
        (no_config, r"has no config\.json"),
        (broken_config, r"config\.json is not valid JSON"),
        (no_type, "names no model_type"),
        (no_weights, r"has no model\*\.safetensors"),
        (missing_shard, r"lacks 1 shard\(s\): model-00002-of-00002"),
        (truncated, "is truncated: its header promises"),
        (unknown_type, "of type 'martian', which mlx-lm .* does not know"),
        (other_shape, r"do not fit its config\.json"),
        (missing_tensor, r"do not fit its config\.json"),
        (own_code, "wants to run its own Python"),
        (no_tokenizer, "the tokenizer in .* does not load"),
    ],
)
def test_a_damaged_directory_is_one_clear_message(broken, damage, says):
    damage(broken)
    with pytest.raises(ModelError, match=says):
        load(broken)


def test_names_that_are_no_model_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        load(tmp_path / "file")
    with pytest.raises(ModelError, match="no model directory"):
        load(tmp_path / "none")


def test_a_hub_id_that_cannot_be_fetched_is_one_message(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing is neither a directory here nor"):
        load("nobody/nothing")


def test_a_loaded_base_is_frozen_and_counts_packed_weights(dense, quantized):
    assert dense.model.trainable_parameters() in ({}, []) or not any(
        True for _ in _leaves(dense.model.trainable_parameters())
    )
    assert dense.parameters == quantized.parameters


def _leaves(tree):
    from mlx.utils import tree_flatten

    return tree_flatten(tree)


def test_the_identity_tells_bases_apart(dense, quantized):
    assert dense.identity.fingerprint != quantized.identity.fingerprint
    assert dense.identity.template == quantized.identity.template
    assert load(dense.path).identity == dense.identity
