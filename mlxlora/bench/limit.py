"""How far a training step is from the machine's limit: its necessary arithmetic, and the rate.

Counted are multiplications and additions of matrix products that any exact LoRA update
needs: forward and the gradient of the input through the frozen layers, for every real token
(padding is not necessary); the head for supervised tokens only; the low-rank products;
attention over the lower triangle. Not counted: norms, softmax, the optimizer, recomputation,
and the small savings at both ends of the network (no gradient below the first block, no
unsupervised token above the last attention).
"""

import time
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from mlxlora.data.render import Example
from mlxlora.machine import on_cpu

COUNTED = ("llama", "qwen2", "qwen3")  # dense families whose config says all there is
SIDE = 2048  # of the square matrices whose product is timed
TRIALS = 5
GPU_CHAIN = 16  # products between two readings of the clock, so that launching costs nothing


def operations(config: dict[str, Any], rank: int, examples: Iterable[Example]) -> int:
    """Floating-point operations of an update over these rows; 0 for families not COUNTED."""
    if config["model_type"] not in COUNTED:
        return 0
    tokens = supervised = pairs = 0
    for example in examples:
        length = len(example.tokens) - 1  # the last token predicts nothing
        tokens += length
        supervised += example.supervised
        pairs += length * (length + 1) // 2
    layers = _linear_layers(config)
    blocks, heads = config["num_hidden_layers"], config["num_attention_heads"]
    frozen = 2 * 2 * sum(a * b for a, b in layers)  # forward, input gradient
    # forward through A and B, and for each of the two the gradient of input and of weight
    low_rank = 3 * 2 * sum(rank * (a + b) for a, b in layers)
    head = 2 * 2 * config["hidden_size"] * config["vocab_size"]
    # scores and values forward; values, probabilities, queries and keys backward
    attention = (2 + 4) * 2 * heads * _head_size(config)
    return blocks * (tokens * (frozen + low_rank) + pairs * attention) + supervised * head


def _head_size(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _linear_layers(config: dict[str, Any]) -> list[tuple[int, int]]:
    """(in, out) of the linear layers of one block."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    heads, size = config["num_attention_heads"], _head_size(config)
    queries, keys = heads * size, (config.get("num_key_value_heads") or heads) * size
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*attention, (hidden, mlp), (hidden, mlp), (mlp, hidden)]


def matrix_rate(dtype: mx.Dtype) -> float:
    """Operations per second of a plain matrix product: the best of a few."""
    chain = 1 if on_cpu() else GPU_CHAIN
    left = mx.random.normal((SIDE, SIDE), dtype, key=mx.random.key(0))
    right = left * SIDE**-0.5  # so that a chain of products stays finite
    mx.eval(left, right)
    best = float("inf")
    for _ in range(TRIALS):
        product = left
        began = time.perf_counter()
        for _ in range(chain):
            product = product @ right
        mx.eval(product)
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 * chain / best
