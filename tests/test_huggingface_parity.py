"""What export --format hf writes, loaded by transformers: the same logits, no key too many or few.

Tiny models of transformers' own, with random weights: the base. On it an adapter over every
linear layer.
"""

import copy
import json
from functools import partial

import mlxlora  # noqa: F401  (loads OpenBLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized, write_tokenizer

from mlxlora.base import load
from mlxlora.config import LoraConfig
from mlxlora.export.hf import directory as huggingface
from mlxlora.export.hf.names import FAMILIES, SEEING
from mlxlora.export.quantize import quantize
from mlxlora.lora.attach import detach
from mlxlora.lora.fresh import collect, new_layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

write = partial(huggingface.write, proof=None)  # random adapters gain nothing
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
INDEXED = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 16}
MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
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
    "gemma": TIED,  # its activation is a tanh in transformers, and exact in mlx-lm
    "gemma2": TIED,
    "gemma3_text": {**TIED, **BY_KIND},
    "phi": {**MANY, "rope_parameters": HALF_ROPE, "hidden_act": "gelu_pytorch_tanh"},
    "phi3": {},
    "cohere": {**MANY, **TIED},
    "cohere2": {**TIED, **WINDOWS},
    "olmo2": {},
    "olmo3": BY_KIND,
    "starcoder2": {**TIED, "hidden_act": "gelu"},  # which mlx-lm computes whatever is said
    "stablelm": {"rope_parameters": HALF_ROPE, "use_qkv_bias": True},
    "glm": {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
    "glm4": {"rope_parameters": HALF_ROPE},
    "granite": {**TIED, "logits_scaling": 7.0, "residual_multiplier": 0.3},
    "helium": {},
    "smollm3": {**TIED, "no_rope_layers": [1, 0]},
    "exaone4": WINDOWS,
    "ernie4_5": TIED,
    "seed_oss": {},
    "nemotron": {"rope_parameters": HALF_ROPE},
    "hunyuan_v1_dense": {},
    "gpt_bigcode": {**TIED, **GPT, "n_inner": 96, "activation_function": "gelu"},
    "gpt2": {**TIED, **GPT},
    "gptj": {**GPT, "rotary_dim": 8},
    "gpt_neox": {"intermediate_size": 256, "hidden_act": "gelu_pytorch_tanh"},
    "apertus": {},
    "mamba": {**TIED, "state_size": 8, "time_step_rank": 4, "intermediate_size": 128},
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
        "expand": 2,
        "time_step_rank": 4,
    },
    "lfm2": {**TIED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "olmoe": {**EXPERTS, **MANY},
    "glm4_moe": SHARED,
    "solar_open": SHARED,
    "mellum": {**EXPERTS, **BY_KIND},
    "dots1": SHARED,
    "afmoe": {**EXPERTS, **WINDOWS, "num_dense_layers": 1, "num_shared_experts": 1},
    "mixtral": EXPERTS,
    "phimoe": {**EXPERTS, "attention_bias": True, "lm_head_bias": True},
    "exaone_moe": {**SHARED, **WINDOWS, "first_k_dense_replace": 1},
    "granitemoe": EXPERTS,
    "jamba": {
        "num_experts": 1,
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
        "rope_parameters": HALF_ROPE,
    },
    "deepseek_v2": {
        **LATENT,
        "q_lora_rank": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        },
    },
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "deepseek_v32": {**LATENT, **INDEXED},
    "glm_moe_dsa": {**LATENT, **INDEXED},
    "minimax_m2": EXPERTS,
    "lfm2_moe": {
        **EXPERTS,
        **TIED,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
        "use_expert_bias": True,
    },
    "granitemoehybrid": {
        **EXPERTS,
        **MAMBA_2,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
    },
    "gemma4_text": {
        **TIED,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "sliding_window": 8,
        "rope_parameters": {
            "sliding_attention": ROPE,
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
            },
        },
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 260,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "final_logit_softcapping": 30.0,
        "num_experts": 4,
        "moe_intermediate_size": 32,
    },
    "recurrent_gemma": {
        **TIED,
        "conv1d_width": 4,
        "num_key_value_heads": 1,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
        "lru_width": 64,
        "rope_parameters": HALF_ROPE,
    },
    "nemotron_h": {
        **SHARED,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": None,
    },
}
TEXT = {
    "gemma3_text": OPTIONS["gemma3_text"],
    "gemma4_text": OPTIONS["gemma4_text"],
    "mistral": {},
    "ministral3": OPTIONS["ministral3"],
}
TEXT["qwen3_5_text"] = {k: v for k, v in OPTIONS["qwen3_next"].items() if k not in EXPERTS}
TEXT["qwen3_5_moe_text"] = OPTIONS["qwen3_next"]
# model_type (and a word) -> model_type of the language model, what sees
PIXTRAL = {"model_type": "pixtral"}
EYES = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
QWEN_EYES = {
    **{"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4},
    "out_hidden_size": 64,
}
TOKENS_OF = {"image_token_index": 259, "image_token_id": 259}
SEEN_WITH = {
    "gemma3": ("gemma3_text", {"vision_config": EYES, "mm_tokens_per_image": 4, **TOKENS_OF}),
    "mistral3": ("mistral", {"vision_config": {**PIXTRAL, **EYES}, **TOKENS_OF}),
    "mistral3 (2)": ("ministral3", {"vision_config": {**PIXTRAL, **EYES}, **TOKENS_OF}),
    "qwen3_5": ("qwen3_5_text", {"vision_config": QWEN_EYES, **TOKENS_OF}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"vision_config": QWEN_EYES, **TOKENS_OF}),
    "gemma4": ("gemma4_text", {"vision_config": EYES, "audio_config": None, **TOKENS_OF}),
}
# What transformers 5 writes into config.json by other names than mlx-lm reads, or not at all.
OLD_NAMES = {"vocab_size": 260, "rope_theta": 10000.0, "rope_scaling": None}
THETA = {"rope_theta": 10000.0}
FOUR = {"num_experts": 4}
HALF = {"partial_rotary_factor": 0.5}
OLD_NAMES_OF = {
    "ministral3": {"rope_theta": None},
    "gemma3_text": {"sliding_window_pattern": 2, **THETA, "rope_local_base_freq": 10000.0},
    "cohere2": {"sliding_window_pattern": 2},
    "exaone4": {"sliding_window_pattern": "LG"},
    "gpt2": {"n_ctx": 64},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "apertus": {"post_norm": False, "qk_norm": True, "mlp_bias": False},
    "lfm2": {"block_dim": 64, "block_ff_dim": 96},
    **dict.fromkeys(("qwen3_moe", "mellum"), FOUR),
    **dict.fromkeys(("phi", "stablelm", "glm4", "nemotron", "glm4_moe"), HALF),
    "solar_open": {"partial_rotary_factor": 1.0, "first_k_dense_replace": 0},
    "deepseek_v2": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
        }
    },
    "glm": {"partial_rotary_factor": 1.0},
    "olmo3": THETA,
    "gemma4_text": {"global_head_dim": 32},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "minimax_m2": {"shared_intermediate_size": 32, "rotary_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "exaone_moe": {"is_moe_layer": [False, True]},
}
OLD_NAMES_OF["qwen3_next"] = {**FOUR, **HALF, "full_attention_interval": 2}
OLD_NAMES_OF["qwen3_5_text"] = {**HALF, "full_attention_interval": 2}
OLD_NAMES_OF["qwen3_5_moe_text"] = OLD_NAMES_OF["qwen3_next"]
DIFFERENCES: dict[str, float] = {}  # family -> largest difference of logits, of the largest


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print(f"\n{'family':40}largest logit difference")
    for name, found in DIFFERENCES.items():
        print(f"{name:40}{found:.1e}")


def made(family: str, path):
    """A base of this family in the directory, by transformers; its model."""
    kind = transformers.AutoModelForCausalLM
    options = {**SIZES, **(OPTIONS.get(family) or {})}
    if family in SEEN_WITH:
        kind = transformers.AutoModelForImageTextToText
        text, vision = SEEN_WITH[family]
        text_config = {"model_type": text, **SIZES, **TEXT[text]}
        tied = {"tie_word_embeddings": text_config["tie_word_embeddings"]}
        options = {"text_config": text_config, **vision, **tied}
    config = transformers.AutoConfig.for_model(family.partition(" ")[0], **copy.deepcopy(options))
    torch.manual_seed(1)
    model = kind.from_config(config)
    with torch.no_grad():  # larger than at birth, so that every part matters
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    described = json.loads((path / "config.json").read_text())
    if family in SEEN_WITH:
        as_hub_says(described["text_config"], SEEN_WITH[family][0], TEXT)
        described["vocab_size"] = 260
    else:
        as_hub_says(described, family, OPTIONS)
    (path / "config.json").write_text(json.dumps(described))
    write_tokenizer(path)
    if family in PUBLISHED:
        file = path / "model.safetensors"
        safetensors.save_file(PUBLISHED[family](safetensors.load_file(file)), file)
    return model.eval()


def as_hub_says(config: dict, family: str, options: dict) -> None:
    """Add to a config what older ones have, and mlx-lm reads."""
    rope = {**SIZES, **options[family]}["rope_parameters"]
    old = OLD_NAMES if isinstance(rope.get("rope_theta"), float) else {}
    config |= old | OLD_NAMES_OF.get(family, {})


def without_prefix(tensors: dict) -> dict:
    """GPT-2's weights by the names they were published under, which mlx-lm reads."""
    tensors.pop("lm_head.weight", None)
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_fused_experts(tensors: dict) -> dict:
    """The experts of Qwen 3.5 as one parameter, as published, and mlx-lm reads them."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for place in {name.partition(".experts.")[0] for name in tensors.keys() - found.keys()}:
        gate, up, down = (
            torch.stack([tensors[f"{place}.experts.{n}.{leaf}_proj.weight"] for n in range(4)])
            for leaf in ("gate", "up", "down")
        )
        found[f"{place}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        found[f"{place}.experts.down_proj"] = down
    return found


# What transformers 5 writes under other names than the models were published with.
PUBLISHED = {"gpt2": without_prefix, "qwen3_5_moe": with_fused_experts}


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
    assert OPTIONS.keys() | TEXT.keys() == FAMILIES.keys()
    assert {family.partition(" ")[0] for family in SEEN_WITH} == SEEING.keys()


@pytest.mark.parametrize("family", [*OPTIONS, *SEEN_WITH])
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
        if family == "qwen3_next" and "norm" in name:  # 1 is added and taken away
            assert torch.allclose(found[name], tensor, atol=1e-6), name
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_base_of_four_bits_is_unpacked(family, tmp_path):
    made(family, tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "base", bits=4, group_size=32)
    base = load(tmp_path / "base")
    adapter, logits = tuned(base)
    write(base, adapter, tmp_path / "out")
    found = difference(their_logits(loaded(tmp_path / "out")), logits)
    DIFFERENCES[f"{family}, 4-bit base"] = found
    assert found < 1e-4


MORE = {
    "DoRA": ("llama", {"method": "dora"}),
    "embedding and head low-rank": ("llama", {"targets": ("q_proj", "embed_tokens", "lm_head")}),
    "tied embedding low-rank": ("qwen2", {"targets": ("q_proj", "embed_tokens")}),
    "head and norm whole": ("qwen3", {"train_also": ("lm_head", "norm")}),
    "the head of a 4-bit base whole": ("qwen3", {"train_also": ("lm_head",)}),
}


@pytest.mark.parametrize("name", MORE)
def test_adapters_of_every_kind_are_merged(name, tmp_path):
    family, options = MORE[name]
    made(family, tmp_path / "base")
    if "4-bit" in name:
        quantize(tmp_path / "base", tmp_path / "packed", bits=4, group_size=32)
    base = load(tmp_path / ("packed" if "4-bit" in name else "base"))
    adapter, logits = tuned(base, **options)
    write(base, adapter, tmp_path / "out")
    found = difference(their_logits(loaded(tmp_path / "out")), logits)
    DIFFERENCES[f"{family}, {name}"] = found
    assert found < 1e-4


def test_half_precision_is_loaded_in_the_type_that_config_says(tmp_path):
    theirs = made("qwen3_moe", tmp_path / "base")
    write(tmp_path / "base", None, tmp_path / "out", "bf16")
    model = loaded(tmp_path / "out", "auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert difference(their_logits(model), their_logits(theirs)) < 0.1


def test_the_tokenizer_is_loaded_too(tmp_path):
    made("llama", tmp_path / "base")
    write(tmp_path / "base", None, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith("<|im_start|>user")
