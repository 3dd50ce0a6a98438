"""GGUF files in llama.cpp, beside the logits of MLX's base with the adapter attached.

`python -m pytest -s -m slow tests/test_gguf.py` prints the largest differences, by family.
"""

import json
import textwrap
from functools import partial
from pathlib import Path

import architectures
import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized, write_tokenizer
from documents import guide, section
from memory import peak

from mlxlora.base import load
from mlxlora.config import LoraConfig
from mlxlora.errors import ExportError
from mlxlora.export import shards
from mlxlora.export.gguf import adapter as gguf_lora
from mlxlora.export.gguf import model as gguf
from mlxlora.export.gguf.families import FAMILIES
from mlxlora.export.gguf.kinds import QUANTS
from mlxlora.export.quantize import quantize
from mlxlora.lora.attach import attach
from mlxlora.lora.fresh import collect, new_layers

llama_cpp = pytest.importorskip("llama_cpp")
import llama  # noqa: E402
from gguf import GGUFReader  # noqa: E402

write = partial(gguf.write, proof=None)  # random adapters gain nothing; test_proof.py measures

pytestmark = [pytest.mark.llama, pytest.mark.filterwarnings("ignore")]

TOKENS = [1, 5, 190, 33, 7, 90, 12, 195, 3, 4, 8, 100, 101, 44, 45, 46, 47, 48, 49, 50]
SMALL_HEADS = {"query_pre_attn_scalar": 16}  # llama.cpp knows only the root of a head's size
ALL_EXPERTS = {"mlp_only_layers": []}
FACTORS = {"long_factor": [1.5 + i / 4 for i in range(8)], "short_factor": [1.0] * 8}
LONG = {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_scaling": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 64,
    }
}
YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
}
DELTA = {
    **{"linear_value_head_dim": 32, "rms_norm_eps": 1e-6},
    "rope_parameters": {
        **{"type": "default", "mrope_section": [1, 1, 0]},
        **{"rope_theta": 100000.0, "partial_rotary_factor": 0.25},
    },
}
TEMPERED = {
    **{"rope_theta": 10000.0, "original_max_position_embeddings": 16},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}
# what is tried -> (family, what is not as in architectures.py)
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama, tied, biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, many frequencies": ("llama", LLAMA3),
    "llama, linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "mistral": ("llama", {"model_type": "mistral"}),
    "mixtral": ("mixtral", ALL_EXPERTS),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", ALL_EXPERTS),
    "qwen3": ("qwen3", {}),
    "qwen3, YaRN": ("qwen3", YARN),
    "qwen3_moe": ("qwen3_moe", ALL_EXPERTS),
    "qwen3_5": ("qwen3_5", {"num_experts": 0, **DELTA}),
    "qwen3_5_moe": ("qwen3_5_moe", {**ALL_EXPERTS, **DELTA}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**SMALL_HEADS, "sliding_window": 4096}),
    "gemma3_text": (
        "gemma3_text",
        {
            **SMALL_HEADS,
            "sliding_window_pattern": 6,
            "num_hidden_layers": 7,
            "rope_local_base_freq": 10000.0,
        },
    ),
    "phi": ("phi", {"tie_word_embeddings": False}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.75}),
    "phi3, LongRoPE": ("phi3", LONG),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "olmoe": ("olmoe", {**ALL_EXPERTS, "norm_topk_prob": False, "num_key_value_heads": 4}),
    "starcoder2": ("starcoder2", {}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", {**ALL_EXPERTS, "moe_intermediate_size": None}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": None}),
    "stablelm": ("stablelm", {}),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 256, "num_key_value_heads": 4}),
    "gpt2": ("gpt2", {"num_key_value_heads": None}),
    "cohere": ("cohere", {"use_qk_norm": False}),
    "cohere2": ("cohere2", {"sliding_window_pattern": 4, "num_hidden_layers": 4}),
    "glm4": ("glm4", {}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone": ("exaone", {}),
    "exaone4": (
        "exaone4",
        {
            **LLAMA3,
            **{"sliding_window_pattern": None, "sliding_window": None},
            "layer_types": ["full_attention"] * 2,
        },
    ),
    "seed_oss": ("seed_oss", {"attention_bias": True}),
    "minicpm": ("minicpm", {}),
    "nemotron": ("nemotron", {}),
    "mimo": ("mimo", {}),
    "helium": ("helium", {}),
    "gpt_oss": ("gpt_oss", {**ALL_EXPERTS, **YARN, "moe_intermediate_size": None}),
    "glm4_moe": ("glm4_moe", {}),
    "dots1": ("dots1", {"num_key_value_heads": 4}),
    "lfm2": ("lfm2", {}),
    "olmo3, YaRN": ("olmo3", YARN),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 50.0}},
    ),
    "ministral3": (
        "ministral3",
        {"layer_types": None, "rope_parameters": {**YARN["rope_scaling"], **TEMPERED}},
    ),
}
# llama.cpp looks GELU up in a table of float16.
LOOKED_UP = {"gemma", "gemma2", "gemma3_text", "phi", "starcoder2", "gpt2", "gpt_neox"}
WITH_EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "glm4_moe"}
WITH_EXPERTS |= {"dots1", "qwen3_5_moe"}
DIFFERENCES: dict[str, dict[str, float]] = {}  # case -> type -> largest difference


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    kinds = ("f32", "f16", "q8_0", "adapter")
    print("\n" + " " * 28 + "".join(f"{kind:>13}" for kind in kinds))
    for name, found in DIFFERENCES.items():
        cells = [f"{found[kind]:.1e}" if kind in found else "" for kind in kinds]
        print(f"{name:28}" + "".join(f"{cell:>13}" for cell in cells))


def write_base(directory: Path, family: str, **changes) -> Path:
    """A tiny model of the family with the byte tokenizer."""
    changes = {"vocab_size": 259, "eos_token_id": 258, **changes}
    said = changes.pop("model_type", family)  # what mlx-lm takes for the same family
    architectures.write_model(directory, family, **changes)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": said}))
    weights = mx.load(str(directory / "model.safetensors"))
    for name, array in weights.items():  # or a rounded weight changes everything after it
        if (array.ndim > 1 and ".layers." in name) or ".h." in name:
            weights[name] = 0.4 * array
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    write_tokenizer(directory)
    return directory


def adapted(path: Path, **lora):
    """(adapter, the logits of base + adapter, (token, vocabulary))."""
    base = load(path)
    config = LoraConfig(**{"rank": 4, "alpha": 8.0, **lora})
    plain = our_logits(base)
    new_layers(base.model, config, 0)
    randomized(base.model)
    adapter = collect(base.model, config, {"base": base.identity.to_dict()})
    ours = our_logits(base)
    assert difference(plain, ours) > 0.03  # or nothing would be shown
    return adapter, ours


def our_logits(base) -> np.ndarray:
    return np.array(base.model(mx.array([TOKENS]))[0].astype(mx.float32))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest, relative to the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_base_and_adapter(name, tmp_path):
    family, changes = CASES[name]
    path = write_base(tmp_path / "base", family, **changes)
    adapter, ours = adapted(path)
    found = DIFFERENCES.setdefault(name, {})
    for quant in ("f32", "f16", "q8_0"):
        out = tmp_path / f"{quant}.gguf"
        write(path, adapter, out, quant)
        found[quant] = difference(ours, llama.logits(out, TOKENS))
    assert found["f32"] < (5e-3 if family in LOOKED_UP else 1e-4)
    assert found["f16"] < 0.05
    # where two experts are as good as each other, rounding chooses the other one
    assert found["q8_0"] < (1.0 if family in WITH_EXPERTS else 0.2)
    write(path, None, tmp_path / "base.gguf", "f32")
    gguf_lora.write(path, adapter, tmp_path / "lora.gguf")
    theirs = llama.logits(tmp_path / "base.gguf", TOKENS, lora=tmp_path / "lora.gguf")
    found["adapter"] = difference(ours, theirs)
    assert found["adapter"] < (5e-3 if family in LOOKED_UP else 1e-4)
    for read, array in gguf.read_back(tmp_path / "base.gguf", path):
        own = weights_of(path)[read]
        moved = mx.abs(array - own).max().item()  # of norms that are written as 1 + weight
        assert moved == 0 or ("norm" in read and moved < 1e-6), read


def test_every_family_that_is_written_is_tried_here():
    tried = {changes.get("model_type", family) for family, changes in CASES.values()}
    assert tried == set(FAMILIES)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "qwen", "qwen3")


def test_greedy_text_is_the_same(qwen, tmp_path):
    adapter, _ = adapted(qwen)
    write(qwen, adapter, tmp_path / "x.gguf", "f32")
    base = load(qwen)
    attach(base.model, adapter)
    ours = list(TOKENS)
    for _ in range(32):
        ours.append(int(mx.argmax(base.model(mx.array([ours]))[0, -1])))
    assert llama.greedy(tmp_path / "x.gguf", TOKENS, 32) == ours[len(TOKENS) :]


def test_a_quantized_base_is_unpacked(qwen, tmp_path):
    quantize(qwen, tmp_path / "packed", bits=4, group_size=32)
    adapter, ours = adapted(tmp_path / "packed")
    write(tmp_path / "packed", adapter, tmp_path / "x.gguf", "f32")
    assert difference(ours, llama.logits(tmp_path / "x.gguf", TOKENS)) < 1e-4
    write(tmp_path / "packed", None, tmp_path / "base.gguf", "f32")
    gguf_lora.write(tmp_path / "packed", adapter, tmp_path / "lora.gguf")
    theirs = llama.logits(tmp_path / "base.gguf", TOKENS, lora=tmp_path / "lora.gguf")
    assert difference(ours, theirs) < 1e-4
    read = dict(gguf.read_back(tmp_path / "base.gguf", tmp_path / "packed"))
    assert {name: array.shape for name, array in read.items()} == {
        name: array.shape for name, array in weights_of(qwen).items()
    }


# type -> the largest error of a weight, relative to the largest of its 32
STEPS = {"f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 5e-3, "q5_1": 0.04, "q5_0": 0.07}
STEPS |= {"q4_1": 0.08, "q4_0": 0.14}


@pytest.mark.parametrize("quant", QUANTS)
def test_every_type_loads_and_holds_the_weights_as_well_as_it_can(quant, qwen, tmp_path):
    done = write(qwen, None, tmp_path / "x.gguf", quant)
    assert done.bytes == (tmp_path / "x.gguf").stat().st_size
    assert np.isfinite(llama.logits(tmp_path / "x.gguf", TOKENS)).all()
    own = weights_of(qwen)
    for name, array in gguf.read_back(tmp_path / "x.gguf", qwen):
        if array.ndim == 1:
            assert mx.array_equal(array, own[name]), name
            continue
        blocks, read = own[name].reshape(-1, 32), array.reshape(-1, 32)
        largest = mx.abs(blocks).max(-1, keepdims=True)
        assert mx.all(mx.abs(read - blocks) <= STEPS[quant] * largest), name


def weights_of(path: Path) -> dict[str, mx.array]:
    return mx.load(str(path / "model.safetensors"))


def test_the_output_has_eight_bits_at_least_and_odd_rows_are_float16(tmp_path):
    kinds = {}
    for name, tied in (("tied", True), ("own", False)):
        changes = {"intermediate_size": 40, "tie_word_embeddings": tied}
        path = write_base(tmp_path / name, "llama", **changes)
        done = write(path, None, tmp_path / f"{name}.gguf", "q4_0")
        assert any("blk.0.ffn_down.weight" in note for note in done.notes)
        kinds[name] = types_of(tmp_path / f"{name}.gguf")
        assert np.isfinite(llama.logits(tmp_path / f"{name}.gguf", TOKENS)).all()
    assert kinds["tied"]["token_embd.weight"] == "Q8_0"
    assert kinds["own"]["token_embd.weight"] == "Q4_0"
    assert kinds["own"]["output.weight"] == "Q8_0"
    assert kinds["own"]["blk.0.ffn_down.weight"] == "F16"
    assert kinds["own"]["blk.0.attn_norm.weight"] == "F32"
    assert kinds["own"]["blk.0.attn_q.weight"] == "Q4_0"


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(str(path)).tensors}


def test_the_language_model_of_one_that_sees(tmp_path):
    changes = CASES["gemma3_text"][1]
    path = write_base(tmp_path / "base", "gemma3", **changes)
    adapter, ours = adapted(path)
    write(path, adapter, tmp_path / "x.gguf", "f32")
    assert difference(ours, llama.logits(tmp_path / "x.gguf", TOKENS)) < 5e-3


def test_long_texts_turn_by_the_factors_that_mlx_uses(tmp_path):
    """llama.cpp chooses by the context it is given: beyond the original one, the long factors."""
    path = write_base(tmp_path / "base", "phi3", **LONG)
    write(path, None, tmp_path / "x.gguf", "f32")
    ours = our_logits(load(path))
    assert difference(ours, llama.logits(tmp_path / "x.gguf", TOKENS, context=512)) < 1e-4
    assert difference(ours, llama.logits(tmp_path / "x.gguf", TOKENS, context=256)) > 1e-3


def test_memory_stays_at_a_few_layers(qwen, tmp_path):
    total = sum(array.nbytes for array in weights_of(qwen).values())
    assert peak(lambda: write(qwen, None, tmp_path / "x.gguf", "q8_0")) < 0.7 * total


@pytest.mark.parametrize(
    "family, changes, says",
    [
        ("phimoe", {}, "models of type phimoe are not written to GGUF"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type dy"),
        ("qwen3", LLAMA3, "rope_scaling of type llama3"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar = 144"),
        ("gemma3_text", {**SMALL_HEADS, "sliding_window_pattern": 2}, "sliding_window_pattern = 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "experts in every block"),
        ("qwen3_moe", {**ALL_EXPERTS, "norm_topk_prob": False}, "norm_topk_prob = False"),
        ("stablelm", {"qk_layernorm": True}, "no place for these tensors"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, says, tmp_path):
    path = write_base(tmp_path / "base", family, **changes)
    with pytest.raises(ExportError, match=says):
        write(path, None, tmp_path / "x.gguf")
    assert [one.name for one in tmp_path.iterdir()] == ["base"]


def test_what_cannot_be_written_is_refused_and_nothing_is_left(qwen, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"'q2_k' is not known .* f32, f16, bf16, q8_0"):
        write(qwen, None, tmp_path / "x.gguf", "q2_k")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="is a directory"):
        write(qwen, None, tmp_path / "empty")
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExportError, match="never overwritten"):
        write(qwen, None, tmp_path / "taken")
    monkeypatch.setattr(shards, "SPARE_BYTES", 1 << 60)
    with pytest.raises(ExportError, match="the disk has"):
        write(qwen, None, tmp_path / "new" / "x.gguf")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["empty", "taken"]


def test_numbers_beyond_float16_are_named_and_nothing_is_left(tmp_path):
    path = write_base(tmp_path / "base", "qwen3")
    weights = weights_of(path)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name] * 1e6
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(ExportError, match=r"blk.1.ffn_up.weight holds numbers beyond float16"):
        write(path, None, tmp_path / "x.gguf", "f16")
    assert [one.name for one in tmp_path.iterdir()] == ["base"]
    write(path, None, tmp_path / "x.gguf", "bf16")


def test_the_guide_names_the_families():
    said = section(guide("exporting"), "gguf")
    assert said == textwrap.fill(", ".join(sorted(FAMILIES)), 99, break_on_hyphens=False)
