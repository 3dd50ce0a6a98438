"""Models to measure with: published shapes with random weights, or a directory's.

Speed and memory depend on a model's shape, not on what it knows, so none is downloaded. The
same seed gives the same weights in every process. There is no tokenizer here, and these
models have no files: that is why they are made from mlx-lm's classes directly, while all
that is on disk goes through base.py.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3

from mlxlora.base import open_model
from mlxlora.machine import compute_dtype
from mlxlora.quantized import QUANTIZED

FAMILIES = {"qwen3": qwen3, "llama": llama}
GROUP_SIZE = 64  # weights that share a scale, as mlx-lm quantizes by default
EMBEDDING_SPREAD = 0.02  # keeps the logits of a tied head near 0: the loss starts at ln(words)


def _qwen3(hidden: int, blocks: int, mlp: int, heads: int, kv: int, size: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": size,
        "vocab_size": 151_936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    }


# A new shape is one line: name -> config.json as published.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**_qwen3(64, 2, 128, 2, 1, 32), "vocab_size": 512},
    "mini": {**_qwen3(384, 6, 1152, 6, 3, 64), "vocab_size": 16_384},
    "small": _qwen3(512, 8, 1536, 8, 4, 64),
    "qwen3-0.6b": _qwen3(1024, 28, 3072, 16, 8, 128),
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {**_qwen3(4096, 36, 12_288, 32, 8, 128), "tie_word_embeddings": False},
}


def build(config: dict[str, Any], bits: int, seed: int = 0) -> nn.Module:
    """A frozen model of this config with random weights: float32 on the CPU, else bfloat16.

    bits: 0, or the width that linear layers and the embedding are quantized to.
    """
    family = FAMILIES[config["model_type"]]
    model: nn.Module = family.Model(family.ModelArgs.from_dict(config))
    dtype = compute_dtype() or mx.bfloat16
    weights = []
    for number, (name, array) in enumerate(sorted(tree_flatten(model.parameters()))):
        if array.ndim > 1:
            # 1/sqrt(in) keeps the size of the activations from layer to layer
            spread = EMBEDDING_SPREAD if "embed" in name else array.shape[-1] ** -0.5
            key = mx.random.key(seed + number)
            array = spread * mx.random.normal(array.shape, dtype, key=key)
        weights.append((name, array.astype(dtype)))
    model.load_weights(weights)
    del weights
    return _ready(model, bits)


def open_directory(path: Path, bits: int) -> nn.Module:
    """The frozen model of a directory in the dtype that training uses; bits as in build()."""
    model, _ = open_model(path)
    dtype = compute_dtype()
    if dtype is not None:
        model.set_dtype(dtype)
    return _ready(model, bits)


def _ready(model: nn.Module, bits: int) -> nn.Module:
    if bits:
        nn.quantize(model, group_size=GROUP_SIZE, bits=bits, class_predicate=_divides)
    model.freeze()
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one by one: a wide weight is gone before the next is made
    model.eval()
    return model


def _divides(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0


def dtype_of(model: nn.Module) -> mx.Dtype:
    """The type that the model computes in."""
    arrays = (array for _, array in tree_flatten(model.parameters()))
    return next(a.dtype for a in arrays if mx.issubdtype(a.dtype, mx.floating))


def weight_count(model: nn.Module) -> int:
    """Number of weights, packed ones counted as if they were not."""
    total = 0
    for module in model.modules():
        packed = isinstance(module, QUANTIZED)
        for name, array in module.items():
            if isinstance(array, mx.array) and not (packed and name in ("scales", "biases")):
                wide = packed and name == "weight"
                total += array.size * 32 // module.bits if wide else array.size
    return total


def vocabulary(config: dict[str, Any]) -> int:
    """Number of different tokens; of a model that sees images too, those of its text."""
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
