"""Tiny random models of many families: everything in a head, a mask or a cache that varies."""

import importlib

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 200,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
# family -> what is not as in SIZES
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "olmo2": {},
    "gemma2": {"num_hidden_layers": 3},  # soft-capped logits and scores
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "cohere": {"num_key_value_heads": 4},  # scaled logits
    "cohere2": {"sliding_window": 8, "sliding_window_pattern": 2},
    "granite": {
        "logits_scaling": 7.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 5.0,
        "residual_multiplier": 0.3,
    },
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 3.0},
    "phi3": {},
    "phi": {"num_key_value_heads": 4},  # a bias in the head
    "gpt_oss": {  # attention sinks, windows, experts
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v2": {  # keys and values of different sizes, from one latent
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
        "num_key_value_heads": 4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 256,
            "mscale_all_dim": 0.7,
        },
    },
    "gpt2": {  # absolute positions
        "n_ctx": 512,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
    },
    "mamba": {  # recurrent
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}


def model_of(family: str, **changes: object) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = {"model_type": family, **SIZES, **FAMILIES[family], **changes}
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = tree_flatten(model.parameters())
    # Larger than at birth, biases and sinks included, so that every part matters.
    grown = [(n, a + 0.3 * mx.random.normal(a.shape, a.dtype)) for n, a in weights if a.ndim < 2]
    grown += [(n, 0.3 * mx.random.normal(a.shape, a.dtype)) for n, a in weights if a.ndim >= 2]
    model.update(tree_unflatten(grown))
    model.freeze()
    mx.eval(model.parameters())
    return model
