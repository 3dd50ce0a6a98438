"""GGUF files in llama.cpp, beside the logits of MLX's base with the adapter attached.

`python -m pytest -s tests/test_gguf.py` prints the largest differences, by family.
"""

import json
from pathlib import Path

import architectures
import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized, write_tokenizer

from mlxlora.base import load
from mlxlora.config import LoraConfig
from mlxlora.export import gguf, gguf_lora
from mlxlora.export.gguf_families import FAMILIES
from mlxlora.lora.fresh import collect, new_layers

llama_cpp = pytest.importorskip("llama_cpp")
import llama  # noqa: E402

pytestmark = [pytest.mark.llama, pytest.mark.filterwarnings("ignore")]

TOKENS = [1, 5, 200, 33, 7, 90, 12, 250, 3, 4, 8, 100, 101, 44, 45, 46, 47, 48, 49, 50]
SMALL_HEADS = {"query_pre_attn_scalar": 16}  # llama.cpp knows only the root of a head's size
ALL_EXPERTS = {"mlp_only_layers": []}
FACTORS = {"long_factor": [1.5 + i / 4 for i in range(8)], "short_factor": [1.0] * 8}
LONG = {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_scaling": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 64,
    }
}
YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
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
}
# llama.cpp looks GELU up in a table of float16.
LOOKED_UP = {"gemma", "gemma2", "gemma3_text", "phi", "starcoder2", "gpt2", "gpt_neox", "cohere"}
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
    config = LoraConfig(rank=4, alpha=8.0, **lora)
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


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_base_and_adapter(name, tmp_path):
    family, changes = CASES[name]
    path = write_base(tmp_path / "base", family, **changes)
    adapter, ours = adapted(path)
    found = DIFFERENCES.setdefault(name, {})
    for quant in ("f32", "f16", "q8_0"):
        out = tmp_path / f"{quant}.gguf"
        gguf.write(path, adapter, out, quant)
        found[quant] = difference(ours, llama.logits(out, TOKENS))
    assert found["f32"] < (2e-3 if family in LOOKED_UP else 1e-4)
    assert found["f16"] < 0.05
    assert found["q8_0"] < 0.2
    gguf.write(path, None, tmp_path / "base.gguf", "f32")
    gguf_lora.write(path, adapter, tmp_path / "lora.gguf")
    theirs = llama.logits(tmp_path / "base.gguf", TOKENS, lora=tmp_path / "lora.gguf")
    found["adapter"] = difference(ours, theirs)
    assert found["adapter"] < (2e-3 if family in LOOKED_UP else 1e-4)
    for read, array in gguf.read_back(tmp_path / "base.gguf", path):
        own = stored(path, read)
        moved = mx.abs(array - own).max().item()  # of norms that are written as 1 + weight
        assert moved == 0 or ("norm" in read and moved < 1e-6), read


def stored(path: Path, name: str) -> mx.array:
    return mx.load(str(path / "model.safetensors"))[name]


def test_every_family_that_is_written_is_tried_here():
    tried = {changes.get("model_type", family) for family, changes in CASES.values()}
    assert tried == set(FAMILIES)
