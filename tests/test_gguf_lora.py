"""Adapters as GGUF over a base in llama.cpp; test_gguf.py tries every family."""

import mlx.core as mx
import pytest
from test_gguf import ALL_EXPERTS, TOKENS, adapted, difference, our_logits, write, write_base

from mlxlora.base import load
from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError, ExportError
from mlxlora.export.gguf import adapter as gguf_lora
from mlxlora.lora.fresh import collect, new_layers, prepare_full

llama_cpp = pytest.importorskip("llama_cpp")
import llama  # noqa: E402
from gguf import GGUFReader  # noqa: E402

pytestmark = [pytest.mark.llama, pytest.mark.filterwarnings("ignore")]

HERE = {
    "embedding and head": ("llama", {}, {"targets": ("q_proj", "embed_tokens", "lm_head")}),
    "biases": ("llama", {"attention_bias": True}, {"targets": ("q_proj", "k_proj")}),
    "rsLoRA": ("qwen3", {}, {"method": "rslora"}),
    "an odd scale": ("qwen3", {}, {"alpha": 2.5}),
    "PiSSA": ("llama", {}, {"method": "pissa"}),
    "ranks by pattern": ("qwen3", {}, {"rank_pattern": {"q_proj": 2}}),
    "one block": ("llama", {}, {"blocks": (1,)}),
    "fused projections": ("phi3", {}, {}),
    "experts alone": ("qwen3_moe", ALL_EXPERTS, {"targets": ("switch_mlp.down_proj",)}),
    "router": ("qwen3_moe", ALL_EXPERTS, {"targets": ("mlp.gate", "v_proj")}),
}


@pytest.mark.parametrize("name", HERE)
def test_the_adapter_does_there_what_it_does_here(name, tmp_path):
    family, changes, lora = HERE[name]
    path = write_base(tmp_path / "base", family, tie_word_embeddings=False, **changes)
    adapter, ours = adapted(path, **lora)
    done = gguf_lora.write(path, adapter, tmp_path / "lora.gguf")
    assert (done.layers, done.rank) == (len(adapter.modules), adapter.rank)
    assert done.bytes == (tmp_path / "lora.gguf").stat().st_size
    write(path, None, tmp_path / "base.gguf", "f32")
    theirs = llama.logits(tmp_path / "base.gguf", TOKENS, lora=tmp_path / "lora.gguf")
    assert difference(ours, theirs) < 1e-4
    assert difference(ours, llama.logits(tmp_path / "base.gguf", TOKENS)) > 0.01


def test_the_file_says_what_it_is(tmp_path):
    path = write_base(tmp_path / "base", "llama")
    adapter, _ = adapted(path)
    gguf_lora.write(path, adapter, tmp_path / "lora.gguf")
    reader = GGUFReader(str(tmp_path / "lora.gguf"))
    said = {name: reader.get_field(name).contents() for name in FIELDS}
    assert said == FIELDS
    shapes = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.lora_a"] == (96, 4)  # as ggml counts: rows last
    assert shapes["blk.0.ffn_down.weight.lora_b"] == (4, 64)


FIELDS = {
    "general.type": "adapter",
    "general.architecture": "llama",
    "adapter.type": "lora",
    "adapter.lora.alpha": 8.0,
}


def test_what_llama_cpp_cannot_adapt_is_refused_by_name(tmp_path):
    path = write_base(tmp_path / "base", "qwen3")  # whose head is the embedding
    refused = {
        r"layers\.0\.self_attn\.q_proj: DoRA": {"method": "dora"},
        r"model\.embed_tokens: the embedding, which is the head": {"targets": ("embed_tokens",)},
        r"model\.norm\.weight: trained whole": {"train_also": ("norm",)},
    }
    for says, lora in refused.items():
        base, config = load(path), LoraConfig(rank=4, **lora)
        new_layers(base.model, config, 0)
        adapter = collect(base.model, config, {"base": base.identity.to_dict()})
        with pytest.raises(ExportError, match=says):
            gguf_lora.write(path, adapter, tmp_path / "lora.gguf")
    base = load(path)
    prepare_full(base.model)
    whole = collect(base.model, LoraConfig(method="full"), {})
    with pytest.raises(ExportError, match="every weight is no LoRA"):
        gguf_lora.write(path, whole, tmp_path / "lora.gguf", force=True)
    assert [one.name for one in tmp_path.iterdir()] == ["base"]


def test_an_adapter_of_another_base_is_refused_unless_forced(tmp_path):
    path = write_base(tmp_path / "base", "qwen3")
    other = write_base(tmp_path / "other", "qwen3", rope_theta=9.0)
    weights = mx.load(str(other / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    mx.save_safetensors(str(other / "model.safetensors"), weights, {"format": "mlx"})
    adapter, _ = adapted(path)
    with pytest.raises(AdapterError, match="trained on another base"):
        gguf_lora.write(other, adapter, tmp_path / "lora.gguf")
    gguf_lora.write(other, adapter, tmp_path / "lora.gguf", force=True)


def test_a_scale_of_nothing_does_nothing(tmp_path):
    """llama.cpp takes an alpha of 0 for none, and so a scale of 1."""
    from dataclasses import replace

    path = write_base(tmp_path / "base", "qwen3")
    adapter, _ = adapted(path)
    gguf_lora.write(path, replace(adapter, scale=0.0), tmp_path / "lora.gguf")
    write(path, None, tmp_path / "base.gguf", "f32")
    theirs = llama.logits(tmp_path / "base.gguf", TOKENS, lora=tmp_path / "lora.gguf")
    assert difference(our_logits(load(path)), theirs) < 1e-4
