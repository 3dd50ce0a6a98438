"""The shape of the tiny base and its first weights: a Qwen3 model small enough to ship.

Qwen3 because mlx-lm, transformers and llama.cpp all have it. Every matrix has an input size
that is a multiple of 64, so MLX can quantize all of them in groups of 64. Weights are float32
under their Hugging Face names; nothing here trains them.
"""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx

HIDDEN, LAYERS, INTERMEDIATE = 256, 3, 640
HEADS, KEY_HEADS, HEAD_SIZE = 4, 2, 64
DEVIATION = 0.02  # of the normal distribution that weights are drawn from, as in GPT-2


def config(vocabulary: int, eos: int, pad: int) -> dict[str, Any]:
    """config.json of the model; eos and pad are token ids."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "initializer_range": DEVIATION,
        "use_cache": True,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }


def matrices() -> dict[str, tuple[int, int]]:
    """(out, in) of each matrix of a block, by its name inside the block."""
    queries, keys = HEADS * HEAD_SIZE, KEY_HEADS * HEAD_SIZE
    return {
        "self_attn.q_proj": (queries, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, queries),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }


NORMS = {
    "input_layernorm": HIDDEN,
    "post_attention_layernorm": HIDDEN,
    "self_attn.q_norm": HEAD_SIZE,
    "self_attn.k_norm": HEAD_SIZE,
}


def weights(vocabulary: int, seed: int) -> dict[str, mx.array]:
    """Random first weights: normal, with those that write to the residual stream scaled down.

    The scale 1 / sqrt(2 * LAYERS) keeps the stream's variance independent of the depth
    (Radford et al. 2019, section 2.3).
    """
    mx.random.seed(seed)

    def normal(shape: tuple[int, int], scale: float = 1.0) -> mx.array:
        return mx.random.normal(shape) * (DEVIATION * scale)

    found = {"model.embed_tokens.weight": normal((vocabulary, HIDDEN))}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name, shape in matrices().items():
            writes = name.endswith(("o_proj", "down_proj"))
            scale = 1 / math.sqrt(2 * LAYERS) if writes else 1.0
            found[f"{block}.{name}.weight"] = normal(shape, scale)
        for name, size in NORMS.items():
            found[f"{block}.{name}.weight"] = mx.ones((size,))
    found["model.norm.weight"] = mx.ones((HIDDEN,))
    return found


def save(directory: Path, vocabulary: int, eos: int, pad: int, seed: int = 0) -> None:
    """Write config.json, generation_config.json and model.safetensors into directory."""
    directory.mkdir(parents=True, exist_ok=True)
    shape = config(vocabulary, eos, pad)
    (directory / "config.json").write_text(json.dumps(shape, indent=2) + "\n")
    generation = {"eos_token_id": eos, "pad_token_id": pad}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = weights(vocabulary, seed)
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "pt"})
