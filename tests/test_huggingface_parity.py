"""What export --format hf writes, loaded by transformers: the same logits, no key too many or few.

Tiny models of transformers' own, with random weights: the base. On it an adapter over every
linear layer.
"""

import copy
import json

import mlxlora  # noqa: F401  (loads OpenBLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized, write_tokenizer

from mlxlora.base import load
from mlxlora.config import LoraConfig
from mlxlora.export.hf_names import FAMILIES
from mlxlora.export.huggingface import write
from mlxlora.lora.attach import detach
from mlxlora.lora.fresh import collect, new_layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOKENS = [[1, 5, 200, 33, 7, 90, 12, 250]]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HALF_ROPE = {**ROPE, "partial_rotary_factor": 0.5}
SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "rope_parameters": ROPE,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
BY_KIND = {**WINDOWS, "rope_parameters": dict.fromkeys(WINDOWS["layer_types"], ROPE)}
TIED = {"tie_word_embeddings": True}
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SHARED = {
    **EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
LATENT = {
    **SHARED,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "head_dim": 16,
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": None}
MANY = {"num_key_value_heads": 4}
# family -> what is not as in SIZES
OPTIONS = {
    "llama": {},
    "mistral": {},
    "ministral3": {
        **TIED,
        "rope_parameters": {
            **ROPE,
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "qwen2": TIED,
    "qwen3": {},
    "gemma": TIED,
    "gemma2": TIED,
    "gemma3_text": {**TIED, **BY_KIND},
    "phi": {**MANY, "rope_parameters": HALF_ROPE, "hidden_act": "gelu_pytorch_tanh"},
    "phi3": {},
    "cohere": {**MANY, **TIED},
    "cohere2": {**TIED, **WINDOWS},
    "olmo2": {},
    "olmo3": WINDOWS,
    "starcoder2": {**TIED, "hidden_act": "gelu_pytorch_tanh"},
    "stablelm": {"rope_parameters": HALF_ROPE, "use_qkv_bias": True},
    "glm": {"rope_parameters": HALF_ROPE},
    "glm4": {"rope_parameters": HALF_ROPE},
    "granite": {**TIED, "logits_scaling": 7.0, "residual_multiplier": 0.3},
    "helium": {},
    "smollm3": {**TIED, "no_rope_layers": [1, 0]},
    "exaone4": WINDOWS,
    "ernie4_5": TIED,
    "seed_oss": {},
    "nemotron": {"rope_parameters": HALF_ROPE},
    "hunyuan_v1_dense": {},
    "gpt_bigcode": {**TIED, **GPT, "n_inner": 96, "activation_function": "gelu_pytorch_tanh"},
    "gpt2": {**TIED, **GPT},
    "gptj": {**GPT, "rotary_dim": 8},
    "gpt_neox": {"intermediate_size": 256, "hidden_act": "gelu_pytorch_tanh"},
    "apertus": {},
    "mamba": {**TIED, "state_size": 8, "time_step_rank": 4, "intermediate_size": 128},
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 2,
        "expand": 2,
        "time_step_rank": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "olmoe": {**EXPERTS, **MANY},
    "glm4_moe": SHARED,
    "solar_open": SHARED,
    "mellum": {**EXPERTS, **BY_KIND},
    "dots1": SHARED,
    "afmoe": {**EXPERTS, **WINDOWS, "num_dense_layers": 1, "num_shared_experts": 1},
    "mixtral": EXPERTS,
    "phimoe": EXPERTS,
    "exaone_moe": {**SHARED, **WINDOWS, "first_k_dense_replace": 1},
    "granitemoe": EXPERTS,
    "jamba": {
        **EXPERTS,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        **EXPERTS,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    },
    "deepseek_v2": {**LATENT, "q_lora_rank": None},
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
}
# What transformers 5 writes into config.json by other names than mlx-lm reads.
OLD_NAMES = {
    "vocab_size": 260,
    "rope_theta": 10000.0,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
}
DIFFERENCES: dict[str, float] = {}  # family -> largest difference of logits, of the largest


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print(f"\n{'family':32}largest logit difference")
    for name, found in DIFFERENCES.items():
        print(f"{name:32}{found:.1e}")


def made(family: str, path, **changes):
    """A base of this family in the directory, by transformers; its model."""
    config = copy.deepcopy({**SIZES, **OPTIONS[family], **changes})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **config)
    )
    with torch.no_grad():  # larger than at birth, so that every part matters
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    described = json.loads((path / "config.json").read_text())
    described = {**OLD_NAMES, **described, **ALSO.get(family, {})}
    (path / "config.json").write_text(json.dumps(described))
    write_tokenizer(path)
    if family == "gpt2":
        as_published(path / "model.safetensors")
    return model.eval()


ALSO: dict = {}


def as_published(file) -> None:
    """GPT-2's weights by the names they were published under, which mlx-lm reads."""
    tensors = safetensors.load_file(file)
    tensors.pop("lm_head.weight", None)
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    safetensors.save_file(renamed, file, {"format": "pt"})


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def our_logits(model) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def tuned(base, **options):
    """(adapter over every linear layer, the base's logits with it)."""
    config = LoraConfig(rank=4, alpha=8.0, **options)
    plain = our_logits(base.model)
    new_layers(base.model, config, 0)
    randomized(base.model)
    adapter = collect(base.model, config, {"base": base.identity.to_dict()})
    logits = our_logits(base.model)
    detach(base.model)
    assert difference(plain, logits) > 0.03  # or nothing would be shown
    return adapter, logits


def loaded(path, dtype=None):
    """transformers' model of the directory, every weight in its place."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype or torch.float32, output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tensors_of(directory) -> dict:
    found: dict = {}
    for file in directory.glob("*.safetensors"):
        found |= safetensors.load_file(file)
    return found


def test_every_family_is_tried():
    assert OPTIONS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", OPTIONS)
def test_base_and_adapter_are_what_transformers_loads(family, tmp_path):
    theirs = made(family, tmp_path / "base")
    base = load(tmp_path / "base")
    assert difference(our_logits(base.model), their_logits(theirs)) < 1e-4
    adapter, logits = tuned(base)
    write(base, adapter, tmp_path / "out")
    found = difference(their_logits(loaded(tmp_path / "out")), logits)
    DIFFERENCES[family] = found
    assert found < 1e-4


@pytest.mark.parametrize("family", OPTIONS)
def test_without_an_adapter_it_is_the_very_file_that_transformers_wrote(family, tmp_path):
    made(family, tmp_path / "base")
    write(tmp_path / "base", None, tmp_path / "out")
    wanted, found = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
