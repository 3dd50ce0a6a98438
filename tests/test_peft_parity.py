"""Adapters from and to PEFT, with the logits of PEFT + transformers over the same base.

`python -m pytest -s tests/test_peft_parity.py` prints the largest differences, by family.
"""

import copy
import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized, write_tokenizer

from mlxlora.base import load
from mlxlora.config import LoraConfig
from mlxlora.export.fuse import fuse
from mlxlora.export.peft import write
from mlxlora.lora.attach import attach, detach
from mlxlora.lora.fresh import collect, new_layers
from mlxlora.lora.peft import read

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOKENS = [[1, 5, 200, 33, 7, 90, 12, 250]]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "rope_parameters": ROPE,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
# What transformers 5 writes into config.json by other names than mlx-lm reads.
OLD_NAMES = {
    "vocab_size": 260,
    "rope_theta": 10000.0,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "num_experts": 4,
    "sliding_window_pattern": 2,
}
# family -> what is not as in SIZES
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "layer_types": ALTERNATING,
        "sliding_window": 8,
        "rope_parameters": dict.fromkeys(ALTERNATING, ROPE),
        "hidden_size": 64,  # whose root is exact: mlx-lm rounds it to bfloat16
    },
    "phi3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gpt_neox": {"intermediate_size": 128, "hidden_act": "gelu_pytorch_tanh"},
    "gpt2": {
        "tie_word_embeddings": True,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "n_ctx": 64,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# The language model of a model that also sees.
SEEING = {
    "text_config": {**SIZES, **FAMILIES["gemma3_text"]},
    "vision_config": {
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    },
    **{"image_token_index": 259, "boi_token_index": 258, "eoi_token_index": 257},
    "mm_tokens_per_image": 4,
}
DIFFERENCES: dict[str, dict[str, float]] = {}  # what was tried -> direction -> difference


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print(f"\n{'':28}{'imported':>12}{'exported':>12}")
    for name, found in DIFFERENCES.items():
        cells = [f"{found[way]:.1e}" if way in found else "" for way in ("import", "export")]
        print(f"{name:28}{cells[0]:>12}{cells[1]:>12}")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family -> (our base, transformers' model of the same weights)."""
    made: dict = {}

    def pair(family: str):
        if family not in made:
            path = tmp_path_factory.mktemp("bases") / family
            options = SEEING if family == "gemma3" else {**SIZES, **FAMILIES[family]}
            options = copy.deepcopy(options)  # transformers writes into it
            config = transformers.AutoConfig.for_model(family, **options)
            torch.manual_seed(1)
            kind = transformers.AutoModelForCausalLM
            if family == "gemma3":
                kind = transformers.AutoModelForImageTextToText
            model = kind.from_config(config)
            with torch.no_grad():  # larger than at birth, so that every part matters
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(path)
            written = json.loads((path / "config.json").read_text())
            for part in (written, written.get("text_config", {})):
                part |= OLD_NAMES
            (path / "config.json").write_text(json.dumps(written))
            write_tokenizer(path, None)
            if family == "gpt2":
                as_published(path / "model.safetensors")
            theirs = kind.from_pretrained(path, dtype=torch.float32)
            made[family] = load(path), theirs
        base, theirs = made[family]
        detach(base.model)
        return base, copy.deepcopy(theirs).eval()

    return pair


def as_published(file) -> None:
    """GPT-2's weights by the names they were published under, which mlx-lm reads."""
    tensors = safetensors.load_file(file)
    tensors.pop("lm_head.weight", None)
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    safetensors.save_file(renamed, file, {"format": "pt"})


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(model) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def note(name: str, way: str, value: float) -> None:
    DIFFERENCES.setdefault(name, {})[way] = value


def trained(model, **config):
    """A PEFT model whose every trained tensor has values, as after training."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                size = 0.3 if "lora_A" in name or "lora_B" in name else 0.05
                parameter.add_(torch.randn_like(parameter) * size)
    return tuned.eval()


def imported(base, theirs, directory, name: str, **config) -> float:
    """What PEFT saves, imported here: the difference of the logits."""
    plain = their_logits(theirs)
    tuned = trained(theirs, **config)
    tuned.save_pretrained(directory)
    expected = their_logits(tuned)
    assert difference(plain, expected) > 0.03  # or nothing would be shown
    adapter = read(directory, base)
    attach(base, adapter)
    found = difference(our_logits(base.model), expected)
    note(name, "import", found)
    return found


def loaded_by_peft(theirs, directory):
    """The model with the adapter, loaded by PEFT with every tensor in its place."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tuned = peft.PeftModel.from_pretrained(theirs, directory)
    told = [str(one.message) for one in said]
    assert not [text for text in told if "missing" in text or "unexpected" in text.lower()]
    tensors = safetensors.load_file(directory / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(tuned, tensors)
    assert result.unexpected_keys == []
    return tuned.eval()


def exported(base, theirs, directory, name: str, **options) -> float:
    """What is trained here, loaded by PEFT: the difference of the logits."""
    config = LoraConfig(**{"rank": 4, "alpha": 8.0, **options})
    plain = our_logits(base.model)
    new_layers(base.model, config, 0)
    randomized(base.model)
    adapter = collect(base.model, config, {"base": base.identity.to_dict()})
    ours = our_logits(base.model)
    detach(base.model)
    assert difference(plain, ours) > 0.03
    write(adapter, base, directory)
    found = difference(ours, their_logits(loaded_by_peft(theirs, directory)))
    note(name, "export", found)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_both_ways(pairs, family, tmp_path):
    targets = {"target_modules": "all-linear"}
    base, theirs = pairs(family)
    assert difference(our_logits(base.model), their_logits(theirs)) < 1e-4
    assert imported(base, theirs, tmp_path / "made", family, r=4, lora_alpha=8, **targets) < 1e-4
    assert exported(*pairs(family), tmp_path / "written", family) < 1e-4


def test_the_language_model_of_a_model_that_sees_both_ways(pairs, tmp_path):
    base, theirs = pairs("gemma3")
    assert difference(our_logits(base.model), their_logits(theirs)) < 1e-4
    targets = {"target_modules": r".*language_model.*_proj"}
    assert imported(base, theirs, tmp_path / "made", "gemma3", r=4, lora_alpha=8, **targets) < 1e-4
    assert exported(*pairs("gemma3"), tmp_path / "written", "gemma3") < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_is_fused_here_is_what_peft_merges(pairs, family, tmp_path):
    base, theirs = pairs(family)
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    options = {"target_modules": PROJECTIONS, **(experts if family == "qwen3_moe" else {})}
    tuned = trained(theirs, r=4, lora_alpha=8, **options)
    tuned.save_pretrained(tmp_path / "made")
    fuse(base, read(tmp_path / "made", base), tmp_path / "fused")
    merged = their_logits(tuned.merge_and_unload())
    assert difference(our_logits(load(tmp_path / "fused").model), merged) < 1e-4


PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
MADE_BY_PEFT = {
    "rsLoRA": ("llama", {"target_modules": PROJECTIONS, "use_rslora": True}),
    "DoRA": ("qwen2", {"target_modules": PROJECTIONS, "use_dora": True}),
    "ranks and alphas by pattern": (
        "llama",
        {
            "target_modules": PROJECTIONS,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 6},
            "alpha_pattern": {r"^model\.layers\.[02]\..*proj": 3.5, "down_proj": 20},
        },
    ),
    "rsLoRA by pattern": (
        "llama",
        {"target_modules": PROJECTIONS, "use_rslora": True, "rank_pattern": {"v_proj": 9}},
    ),
    "some blocks": ("qwen3", {"target_modules": PROJECTIONS, "layers_to_transform": [0, 2]}),
    "one block of a named list": (
        "qwen3",
        {"target_modules": PROJECTIONS, "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "a regular expression": (
        "mistral",
        {"target_modules": r".*\.layers\.[12]\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
    ),
    "all but": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"}),
    "embedding and head whole": (
        "llama",
        {"target_modules": PROJECTIONS, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "embedding and head low-rank": (
        "llama",
        {"target_modules": [*PROJECTIONS, "embed_tokens", "lm_head"]},
    ),
    "tied embedding low-rank": (
        "qwen2",
        {"target_modules": ["v_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tied embedding whole": (
        "qwen2",
        {
            "target_modules": PROJECTIONS,
            "modules_to_save": ["embed_tokens", "lm_head"],
            "ensure_weight_tying": True,
        },
    ),
    "some tokens": (
        "llama",
        {"target_modules": PROJECTIONS, "trainable_token_indices": [5, 33, 250]},
    ),
    "some tokens, tied": (
        "qwen2",
        {"target_modules": PROJECTIONS, "trainable_token_indices": {"embed_tokens": [5, 33]}},
    ),
    "scaled embedding low-rank": (
        "gemma3_text",
        {"target_modules": ["v_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "experts as parameters": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.gate_up_proj": 6},
        },
    ),
    "experts' second half": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ),
    "router": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    ),
    "an orthogonal start": (
        "llama",
        {"target_modules": PROJECTIONS, "init_lora_weights": "orthogonal"},
    ),
}


@pytest.mark.parametrize("name", MADE_BY_PEFT)
def test_what_peft_makes_is_what_is_imported(pairs, name, tmp_path):
    family, options = MADE_BY_PEFT[name]
    assert imported(*pairs(family), tmp_path / "made", name, r=4, lora_alpha=8, **options) < 1e-4


MADE_HERE = {
    "rsLoRA": ("llama", {"method": "rslora"}),
    "DoRA": ("qwen2", {"method": "dora"}),
    "PiSSA": ("llama", {"method": "pissa"}),
    "an odd scale": ("llama", {"rank": 3, "alpha": 2.5}),
    "ranks and alphas by pattern": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "*.1.mlp.*": 7}, "alpha_pattern": {"v_proj": 3.0}},
    ),
    "some blocks": ("qwen3", {"blocks": (0, 2)}),
    "one layer": ("qwen3", {"targets": ("layers.1.mlp.up_proj", "layers.0.mlp.down_proj")}),
    "embedding and head whole": ("llama", {"train_also": ("embed_tokens", "lm_head")}),
    "tied embedding whole": ("qwen2", {"train_also": ("embed_tokens",)}),
    "embedding and head low-rank": ("llama", {"targets": ("q_proj", "embed_tokens", "lm_head")}),
    "tied embedding low-rank": ("qwen2", {"targets": ("q_proj", "embed_tokens")}),
    "scaled embedding low-rank": ("gemma3_text", {"targets": ("q_proj", "embed_tokens")}),
    "experts' first half": ("qwen3_moe", {"targets": ("q_proj", "switch_mlp.gate_proj")}),
    "experts' second half": ("mixtral", {"targets": ("q_proj", "switch_mlp.down_proj")}),
    "router": ("qwen3_moe", {"targets": ("q_proj", "mlp.gate")}),
}


@pytest.mark.parametrize("name", MADE_HERE)
def test_what_is_trained_here_is_what_peft_loads(pairs, name, tmp_path):
    family, options = MADE_HERE[name]
    assert exported(*pairs(family), tmp_path / "written", name, **options) < 1e-4
