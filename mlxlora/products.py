"""The frozen matrix product of training: packed or widened; on a GPU by a short race at the start.

A quantized weight can be multiplied as it is packed or widened first. Which is faster, and
for how many rows, depends on the device and the version of MLX: the CPU is many times as
fast widened, and nobody has told us of every GPU. So there both are timed, forward and
backward, on one layer of the model itself.
"""

import time

import mlx.core as mx
import mlx.nn as nn

from mlxlora.machine import products_known
from mlxlora.quantized import activation_dtype, install_wide_products, remove_wide_products

PACKED, WIDENED = "packed", "widened"
PROBE_ROWS = 512  # enough to tell, few enough to take no time
TRIALS = 3


def choose_products(model: nn.Module, tokens: int) -> str:
    """Let the model's quantized layers multiply the faster way for micro-batches of tokens.

    Returns "packed" or "widened", or "" if no layer of the blocks is quantized.
    """
    if _largest(model) is None:
        return ""
    best = WIDENED if products_known() else _faster(model, min(tokens, PROBE_ROWS))
    use_products(model, best)
    return best


def _faster(model: nn.Module, rows: int) -> str:
    seconds = {}
    for name, prepare in ((PACKED, remove_wide_products), (WIDENED, install_wide_products)):
        prepare(model)
        layer = _largest(model)
        assert layer is not None
        seconds[name] = _time(layer, rows, activation_dtype(model.layers[0]))
    return min(seconds, key=lambda name: seconds[name])


def use_products(model: nn.Module, name: str) -> None:
    """Let the model's quantized layers multiply this way, one that choose_products returned."""
    if name:
        (remove_wide_products if name == PACKED else install_wide_products)(model)


def _largest(model: nn.Module) -> nn.Module | None:
    """The largest quantized linear layer of the blocks."""
    layers = [m for block in model.layers for m in block.modules()]
    quantized = [layer for layer in layers if isinstance(layer, nn.QuantizedLinear)]
    return max(quantized, key=lambda layer: layer.weight.size, default=None)


def _time(layer: nn.Module, rows: int, dtype: mx.Dtype) -> float:
    """Seconds of one product and its gradient, the best of a few."""
    width = layer.scales.shape[1] * layer.group_size
    x = mx.random.normal((rows, width), key=mx.random.key(0)).astype(dtype)
    cotangent = mx.ones((rows, layer.weight.shape[0]), x.dtype)
    mx.eval(x, cotangent)
    best = float("inf")
    for _ in range(TRIALS):
        began = time.perf_counter()
        mx.eval(mx.vjp(lambda x: layer(x), [x], [cotangent]))
        best = min(best, time.perf_counter() - began)
    return best
