"""Every text architecture of mlx-lm as a tiny random model: each kind of block it has, once.

The table says what a family's config does not share with SIZES. What is here is a model file of
mlx-lm; files that are none are NOT_MODELS, and a model that only shows another one's text part
takes that one's config.
"""

import importlib
import json
import textwrap
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

MLX_LM = "0.32.2"  # the version whose model files these are

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
    "sliding_window": 8,
    "use_qk_norm": True,
    **dict.fromkeys(
        ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"),
        1e-5,
    ),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # multi-latent attention: keys and values of different sizes, from one latent
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
    # recurrent blocks
    "conv_kernel": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "use_conv_bias": True,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "conv_L_cache": 3,
    "conv_bias": False,
    "layer_group_size": 2,
    "group_norm_size": 2,
}
TIED = {"tie_word_embeddings": True}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
EVERY_OTHER = {"sliding_window_pattern": 2}
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
MANY_KEYS = {"num_key_value_heads": 4}
GPT = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512}
KDA = {  # one recurrent block, one of attention; blocks are counted from 1
    "kda_layers": [1],
    "full_attn_layers": [2],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}
ROPE_BY_KIND = {
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    "full_attention": {"rope_theta": 500000.0, "rope_type": "default"},
}

# family -> what is not as in SIZES
FAMILIES: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {
        "hidden_dim": 64,
        "num_layers": 3,
        "num_kv_reuse_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "afmoe": {**WINDOWED, "num_dense_layers": 1},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "bailing_hybrid": MANY_KEYS,
    "bailing_moe": {},
    "bailing_moe_linear": {},
    "bailing_moe_v3": MANY_KEYS,
    "bitnet": TIED,
    "cohere": MANY_KEYS,  # scaled logits
    "cohere2": EVERY_OTHER,
    "dbrx": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek": {},
    "deepseek_v2": {
        **MANY_KEYS,
        "q_lora_rank": None,
        "topk_method": "gready",
        "rope_scaling": {**YARN, "mscale_all_dim": 0.7},
    },
    "deepseek_v3": MANY_KEYS,
    "deepseek_v32": MANY_KEYS,
    "deepseek_v41": {
        "num_hidden_layers": 4,
        "qk_rope_head_dim": 8,
        "o_groups": 2,
        "o_lora_rank": 16,
        "scoring_func": "sqrtsoftplus",
        "compress_ratios": [0, 2, 2, 2],
        "kv_source_layer_ids": [1],
        "index_source_layer_ids": [1],
        "hc_mult": 2,
    },
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_layer_start_index": 1,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    "exaone": {"num_layers": 2},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {**WINDOWED, "is_moe_layer": [False, True]},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
    "gear": {
        **TIED,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "conv_mixer"],
    },
    "gemma": {},
    "gemma2": {"num_hidden_layers": 3},  # soft-capped logits and scores
    "gemma3_text": EVERY_OTHER,
    "gemma3n": {
        "text_config": {
            "model_type": "gemma3n_text",
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [96] * 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 200,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    },
    "gemma4_text": {
        **TIED,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 200,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "glm": TIED,
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": MANY_KEYS,
    "glm_moe_dsa": {**MANY_KEYS, "rope_parameters": {"rope_theta": 10000.0}},
    "gpt2": {**GPT, "n_ctx": 512},  # absolute positions
    "gpt_bigcode": {**GPT, "n_inner": 96},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gpt_oss": WINDOWED,  # attention sinks
    "gptj": {**GPT, "rotary_dim": 8},
    "granite": {
        **TIED,
        "logits_scaling": 7.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 5.0,
        "residual_multiplier": 0.3,
    },
    "helium": {},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0}},
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {"loop_window_size": 8},
    "jamba": {
        **TIED,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 1,
    },
    "kimi_k3": {
        "text_config": {
            **MANY_KEYS,
            "model_type": "kimi_linear",
            "linear_attn_config": KDA,
            "activation_situ_beta": 1.0,
            "activation_situ_linear_beta": 1.0,
            "attn_res_block_size": 2,
        }
    },
    "kimi_linear": {**MANY_KEYS, "linear_attn_config": KDA, "model_max_length": 512},
    "laguna": {**WINDOWED, "rope_parameters": ROPE_BY_KIND, "gating": True},
    "lfm2": {
        "block_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"],
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "use_expert_bias": True,
        "num_dense_layers": 1,
    },
    "lille-130m": {
        "block_size": 512,
        "n_embd": 64,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 2,
        "vocab_size": 200,
        **TIED,
    },
    "llama": {},
    "llama4": {
        "text_config": {
            "model_type": "llama4_text",
            "num_hidden_layers": 4,
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
            "num_experts_per_tok": 1,
        }
    },
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 0], **TIED},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "num_layers": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "zero_expert_num": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "num_layers": 2,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba": {**TIED, "time_step_rank": 4},  # recurrent
    "mamba2": {
        "num_heads": 8,
        "time_step_limit": [0.001, 100.0],
        "time_step_rank": 4,
        "intermediate_size": 128,
    },
    "mellum": {**WINDOWED, "rope_parameters": ROPE_BY_KIND},
    "mimo": {"num_nextn_predict_layers": 0},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "n_shared_experts": None,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "swa_v_head_dim": 24,
    },
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 3.0},
    "minicpm3": {
        **MANY_KEYS,
        "dim_model_base": 16,
        "scale_depth": 1.4,
        "scale_emb": 3.0,
        "rope_scaling": {"type": "su", "original_max_position_embeddings": 256},
    },
    "minimax": {"shared_intermediate_size": 32, "rotary_dim": 8},
    "minimax_m3_vl": {
        "text_config": {
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse"],
            "moe_layer_freq": None,
            "layer_types": ["full_attention", "sparse_attention"],
            "index_block_size": 4,
            "index_topk_blocks": 2,
        }
    },
    "ministral3": {
        **WINDOWED,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
            "rope_type": "default",
        },
    },
    "mistral4": {
        **MANY_KEYS,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
            "rope_type": "default",
        },
    },
    "mixtral": {},
    "muse_glimmer": {"layer_types": ["sliding_attention", "full_attention"]},
    "muse_spark": {
        "text_config": {
            **WINDOWED,
            "post_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0},
            "layer_rope_theta": [10000.0, 0],
            "final_logit_softcapping": 20.0,
            "output_multiplier": 0.2,
            "moe_hidden_size": 32,
            "num_shared_experts": 0,
        }
    },
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron-nas": {
        "num_hidden_layers": 3,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
        ],
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "hybrid_override_pattern": "M*-E",
        "moe_latent_size": 32,
    },
    "olmo2": TIED,
    "olmo3": WINDOWED,
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_allow_neg_eigval": True,
        "linear_num_key_heads": 4,
    },
    "olmoe": {},
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "ffn_dim_divisor": 8,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 1.5],
    },
    "phi": MANY_KEYS,  # a bias in the head
    "phi3": {"partial_rotary_factor": 1.0},
    "phi3small": {  # writes to logits with numbers above 100,000
        "vocab_size": 100352,
        "hidden_size": 32,
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 20.0,
    },
    "phimoe": {
        "rope_scaling": {
            **YARN,
            "long_factor": [1.0] * 8,
            "short_factor": [1.0] * 8,
            "long_mscale": 1.2,
            "short_mscale": 1.2,
        }
    },
    "phixtral": {
        "num_vocab": 200,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 8,
    },
    "plamo": {"n_shared_head": 2},
    "plamo2": {**TIED, "hidden_size_per_head": 16, "mamba_num_heads": 4, "mamba_d_state": 8},
    "plamo3": {**TIED, "window_size": 8, **EVERY_OTHER},
    "prism_hadamard_qwen35": {
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": path, "embedding": False, "dtype": "float16", "block": block}
            for path, block in (
                ("model.layers.0.mlp.down_proj", 512),
                ("model.layers.1.mlp.up_proj", 0),
            )
        ],
        "text_config": {"num_experts": 0, "hidden_size": 128, "intermediate_size": 512},
    },
    "qwen": {"kv_channels": 16, **MANY_KEYS},
    "qwen2": TIED,
    "qwen2_moe": {},
    "qwen3": TIED,
    "qwen3_5": {"text_config": {"num_experts": 0}},
    "qwen3_5_moe": {"text_config": {}},
    "qwen3_moe": {},
    "qwen3_next": {},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "num_key_value_heads": 1,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "seed_oss": TIED,
    "smollm3": {**TIED, "no_rope_layers": [1, 0]},
    "solar_open": {},
    "spark2_5": {**TIED, **WINDOWED, "rope_parameters": ROPE_BY_KIND},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": TIED,
    "step3p5": {
        **WINDOWED,
        "num_attention_groups": 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
        "moe_layers_enum": "1",
    },
    "talkie": {},
    "telechat3": {},
    "youtu_llm": {**MANY_KEYS, **TIED},
}
FAMILIES["granitemoe"] = FAMILIES["granite"]
FAMILIES["granitemoehybrid"] = {
    **FAMILIES["granite"],
    "layer_types": ["mamba", "attention"],
    "shared_intermediate_size": 32,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_proj_bias": False,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_n_groups": 2,
    "mamba_conv_bias": True,
}
# The text part of a model that sees too, and whose it is.
SHELLS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
for shell, text in SHELLS.items():
    FAMILIES[shell] = {"text_config": {"model_type": text, **FAMILIES[text]}}

# How rows of several lengths are computed: packed, unless it is said here why not.
PADDED = {
    "a state or a convolution that runs through the sequence": {
        "baichuan_m1",
        "bailing_hybrid",
        "bailing_moe_linear",
        "bailing_moe_v3",
        "falcon_h1",
        "gear",
        "granitemoehybrid",
        "jamba",
        "kimi_k3",
        "kimi_linear",
        "lfm2",
        "lfm2-vl",
        "lfm2_moe",
        "longcat_flash_ngram",
        "mamba",
        "mamba2",
        "nemotron_h",
        "olmo_hybrid",
        "plamo2",
        "prism_hadamard_qwen35",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv7",
    },
    "positions that are not only relative": {
        "gpt2",
        "gpt_bigcode",
        "hunyuan",
        "hunyuan_v1_dense",
        "iquestloopcoder",
    },
    "attention, masks or caches of their own": {
        "afm7",
        "deepseek_v3",
        "deepseek_v32",
        "gemma2",
        "gemma3n",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "kimi_k25",
        "kimi_vl",
        "llama4",
        "longcat_flash",
        "minimax_m3_vl",
        "nemotron-nas",
    },
}
# Whose head is no layer that can be had alone.
WHOLE_LOGITS = {"llama4_text", "seed_oss", "talkie"}
# Whose adapters mlx-lm refuses: it has another form for them.
OURS_ALONE = {"afm7"}
# What mlx-lm's file does not allow, and why.
CANNOT = {
    "bitnet": "its ternary layers run on Metal alone, have no gradient, and cannot hold what "
    "fuse would write",
    "deepseek_v41": "the choice of its experts is not cut off from the gradient, so MLX refuses "
    "to differentiate it",
    "muse_spark": "it consists of Metal kernels that have no gradient",
    "olmo": "it asks for the package ai2-olmo, and ends the program without it",
    "phi3small": "its sparse attention adds true and false to the scores as 1 and 0, so tokens "
    "see what comes after them",
}
FAMILIES["olmo"] = {}

NOT_MODELS = {
    "activations",
    "base",
    "bitlinear_layers",
    "cache",
    "gated_delta",
    "mla",
    "pipeline",
    "rope_utils",
    "ssm",
    "switch_layers",
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of the tiny model. changes are to its text."""
    config = {"model_type": family, **SIZES, **FAMILIES[family]}
    if "text_config" in config:
        config["text_config"] = {**SIZES, **config["text_config"], **changes}
        return config
    return {**config, **changes}


def model_of(family: str, **changes: Any) -> nn.Module:
    """The tiny model, frozen; its weights are the same whenever it is made."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(1)
    config = json.loads(json.dumps(config_of(family, **changes)))  # some write into their config
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    if not hasattr(model, "_no_grad"):
        nn.Module.__init__(model)  # which a class of mlx-lm's forgets
    grown = [(name, _grown(name, array)) for name, array in tree_flatten(model.parameters())]
    model.update(tree_unflatten(grown))
    model.freeze()
    mx.eval(model.parameters())
    return model


def _grown(name: str, array: mx.array) -> mx.array:
    """Larger numbers than at birth, in biases and sinks too, so that every part matters."""
    if not mx.issubdtype(array.dtype, mx.floating):  # packed weights
        return mx.random.randint(0, 1 << 30, array.shape).astype(array.dtype)
    if name.endswith(".signs"):
        return array
    new = 0.3 * mx.random.normal(array.shape, array.dtype)
    return new if array.ndim > 1 else array + new


def write_model(directory: Path, family: str, **changes: Any) -> Path:
    """The tiny model as a directory that mlx-lm loads (without a tokenizer)."""
    directory.mkdir(parents=True)
    weights = dict(tree_flatten(model_of(family, **changes).parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config_of(family, **changes)))
    return directory


def guide_section() -> str:
    """What the guide says of all this."""
    right = FAMILIES.keys() - CANNOT.keys()
    padded = set().union(*PADDED.values())
    kinds = [
        ("packed", right - padded),
        *((f"padded: {reason}", families) for reason, families in PADDED.items()),
        ("whole logits: the head is no layer that can be had alone", WHOLE_LOGITS),
        ("adapters of another form than mlx-lm's, which refuses them", OURS_ALONE),
    ]
    lines = [
        f"{len(right)} of the {len(FAMILIES)} model files of mlx-lm {MLX_LM} go the whole way, "
        "tiny and with random weights. Text parts of models that see too are among them.",
        *(
            f"- {what} ({len(families)}): {', '.join(sorted(families, key=str.lower))}"
            for what, families in kinds
        ),
    ]
    filled = [
        textwrap.fill(
            line,
            99,
            subsequent_indent="  " if line.startswith("-") else "",
            break_on_hyphens=False,
        )
        for line in lines
    ]
    rows = ["| cannot be trained | |", "|---|---|"]
    rows += [f"| {family} | {why} |" for family, why in sorted(CANNOT.items())]
    return "\n\n".join([filled[0], "\n".join(filled[1:]), "\n".join(rows)]) + "\n"
