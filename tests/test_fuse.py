import json
from functools import partial

import mlx.core as mx
import pytest
from conftest import randomized, worst
from memory import peak
from mlx_lm import load as mlx_lm_load

from mlxlora.base import load
from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError, ExportError
from mlxlora.export import fuse as writer
from mlxlora.export import shards
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import detach
from mlxlora.lora.fresh import collect, new_layers, prepare_full

TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])
fuse = partial(writer.fuse, proof=None)  # random adapters gain nothing; test_proof.py measures


def adapted(base, **lora):
    """(adapter, logits with it attached)."""
    config = LoraConfig(rank=4, **lora)
    new_layers(base.model, config, 0)
    randomized(base.model)
    adapter = collect(base.model, config, {"base": base.identity.to_dict()})
    return adapter, base.model(TOKENS)


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_an_unquantized_base_is_fused_exactly(name, request, tmp_path):
    base = request.getfixturevalue(name)
    adapter, logits = adapted(base, targets=("all-linear", "embed_tokens"))
    fuse(base, adapter, tmp_path / "fused")
    model, _ = mlx_lm_load(str(tmp_path / "fused"))
    assert worst(model(TOKENS), logits) < 1e-4


@pytest.mark.parametrize(
    "bits, largest",
    [("none", 1e-4), (8, 0.05), ("auto", 0.5), (6, 0.2), (4, 1.0), ("keep", 1.0)],
)
def test_a_quantized_base_is_fused_at_the_bits_wished_for(quantized, tmp_path, bits, largest):
    adapter, logits = adapted(quantized)
    done = fuse(quantized, adapter, tmp_path / "fused", bits)
    model, _ = mlx_lm_load(str(tmp_path / "fused"))
    assert worst(model(TOKENS), logits) < largest
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    layer = model.layers[0].self_attn.q_proj
    if bits == "none":
        assert "quantization" not in config and "scales" not in layer
    else:
        wanted = {"keep": 4}.get(bits, bits)
        assert layer.bits == wanted or bits == "auto"
        assert model.model.embed_tokens.bits == 4
    assert done.layers == 14


def test_fusing_is_mlx_lm_s_fusing(dense, tmp_path):
    adapter, _ = adapted(dense)
    adapter.save(tmp_path / "adapter")
    fuse(dense, adapter, tmp_path / "fused")
    theirs, _ = mlx_lm_load(str(dense.path), adapter_path=str(tmp_path / "adapter"))
    ours = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    for path, module in theirs.named_modules():
        if hasattr(module, "fuse"):
            assert worst(ours[f"{path}.weight"], module.fuse().weight) < 1e-5


def test_a_full_adapter_replaces_the_weights(dense, tmp_path):
    prepare_full(dense.model)
    dense.model.layers[0].mlp.up_proj.weight = dense.model.layers[0].mlp.up_proj.weight + 0.1
    logits = dense.model(TOKENS)
    adapter = collect(dense.model, LoraConfig(method="full"), {})
    detach(dense.model)
    assert worst(dense.model(TOKENS), logits) > 1e-3
    fuse(dense, adapter, tmp_path / "fused")
    assert worst(load(tmp_path / "fused").model(TOKENS), logits) < 1e-6


def test_shards_are_bounded_listed_and_load(dense, tmp_path, monkeypatch):
    adapter, logits = adapted(dense)
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    fuse(dense, adapter, tmp_path / "fused")
    files = sorted(f.name for f in (tmp_path / "fused").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "fused" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert all(f.stat().st_size < 110_000 for f in (tmp_path / "fused").glob("*.safetensors"))
    assert worst(load(tmp_path / "fused").model(TOKENS), logits) < 1e-4


def test_the_tokenizer_and_template_are_copied_byte_for_byte(dense, tmp_path):
    adapter, _ = adapted(dense)
    fuse(dense, adapter, tmp_path / "fused")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "fused" / name).read_bytes() == (dense.path / name).read_bytes()


def test_memory_stays_at_one_shard(dense, tmp_path, monkeypatch):
    """MLX's peak while fusing, against the size of the model."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    adapter, _ = adapted(dense)
    path, total = (
        dense.path,
        sum(v.nbytes for v in mx.load(str(dense.path / "model.safetensors")).values()),
    )
    mx.eval(list(adapter.weights.values()))
    detach(dense.model)
    assert peak(lambda: fuse(path, adapter, tmp_path / "fused")) < 0.7 * total


def test_what_cannot_be_fused_is_refused_and_nothing_is_left(dense, quantized, tmp_path):
    adapter, _ = adapted(dense)
    out = tmp_path / "fused"
    with pytest.raises(AdapterError, match="trained on another base"):
        fuse(quantized, adapter, out)
    with pytest.raises(ExportError, match="this one is not"):
        fuse(dense, adapter, out, 8)
    with pytest.raises(ExportError, match="--bits 7"):
        fuse(quantized, adapter, out, 7, force=True)
    monkey = dict(adapter.weights)
    monkey["model.layers.0.self_attn.q_proj.lora_a"] = mx.zeros((8, 4))
    from dataclasses import replace

    with pytest.raises(AdapterError, match=r"q_proj\.lora_a: adapter"):
        fuse(dense, replace(adapter, weights=monkey), out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(ExportError, match="never overwritten"):
        fuse(dense, adapter, out)


def test_whole_weights_replace_those_of_a_quantized_base_when_forced(dense, quantized, tmp_path):
    prepare_full(dense.model)
    whole = collect(dense.model, LoraConfig(method="full"), {})
    detach(dense.model)
    fuse(quantized, whole, tmp_path / "fused", "none", force=True)
    tokens = mx.array([[1, 2, 3]])
    assert worst(load(tmp_path / "fused").model(tokens), dense.model(tokens)) < 1e-5


def test_whole_weights_that_the_base_has_not_are_named_and_nothing_is_left(dense, tmp_path):
    strange = Adapter("full", {"model.nothing.weight": mx.zeros((2, 2))})
    with pytest.raises(AdapterError, match=r"model\.nothing\.weight: .* has no such weight"):
        fuse(dense, strange, tmp_path / "fused", force=True)
    assert not (tmp_path / "fused").exists()
