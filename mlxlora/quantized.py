"""Frozen quantized weights: widened, rounded again, and multiplied the fast way per device.

Metal multiplies packed weights directly. The CPU backend does so at a few GFLOP/s, while
BLAS reaches a hundred, so with many rows the CPU widens the weight to float32, multiplies
and forgets it; the backward pass widens it once more instead of keeping it. Only a base so
small that nobody would notice (KEPT_BYTES) is widened once. The layers here stand in for
MLX's and mlx-lm's: same parameters, same names, same mathematics. products.py finds out
which way is the faster one for training.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxlora.machine import on_cpu

# Below this many rows (decoding) the packed product wins on the CPU too.
MANY_ROWS = 4
KEPT_BYTES = 128 << 20  # of a whole base, widened

QUANTIZED = (
    nn.QuantizedLinear,
    nn.QuantizedEmbedding,
    QuantizedSwitchLinear,
    QuantizedMultiLinear,
)


def widen(layer: nn.Module, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The weight of a linear, embedding, experts or heads layer, quantized or not, in dtype.

    (out, in), or (experts or heads, out, in). Dequantized in the dtype of its scales, as MLX does.
    """
    if not isinstance(layer, QUANTIZED):
        return layer.weight.astype(dtype)
    weight = mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        global_scale=layer.get("global_scale"),
    )
    return weight.astype(dtype)


def unpacked(layer: nn.Module) -> mx.array:
    """The weight that packed codes stand for, float32, whatever type the layer computes in.

    widen() rounds it to the type of the scales, as the layer itself does in half precision.
    """
    if not isinstance(layer, QUANTIZED) or layer.mode != "affine":
        return widen(layer)
    return mx.dequantize(
        layer.weight,
        layer.scales.astype(mx.float32),
        layer.biases.astype(mx.float32),
        group_size=layer.group_size,
        bits=layer.bits,
    )


def unquantized(module: nn.Module) -> nn.Module:
    """A module of its own with the same weights, not packed, in the type of its scales.

    One that is not quantized is copied; the arrays are shared.
    """
    if not isinstance(module, QUANTIZED):
        return _like(type(module), module)
    plain: type[nn.Module] = next(p for q, p in _UNQUANTIZED.items() if isinstance(module, q))
    twin = _like(plain, module)
    scales = module.scales.dtype
    dtype = scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16
    for name in ("scales", "biases", "global_scale", "_kept"):
        twin.pop(name, None)
    twin.weight = widen(module, dtype)
    return twin


def activation_dtype(block: nn.Module) -> mx.Dtype:
    """The type that a block computes in, told by its vectors (norms): packed weights hide it."""
    vectors = (a for _, a in tree_flatten(block.parameters()) if a.ndim == 1)
    real = (a.dtype for a in vectors if mx.issubdtype(a.dtype, mx.floating))
    return next(real, mx.float32)


def use_own_products(model: nn.Module) -> None:
    """Let the model's quantized layers multiply as suits this device in general."""
    (install_wide_products if on_cpu() else remove_wide_products)(model)


def install_wide_products(model: nn.Module) -> None:
    """Let every quantized layer of the model multiply widened."""
    stand_ins: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        wide = _WIDE.get(type(module))
        if wide is not None and module.get("global_scale") is None:
            stand_ins.append((path, _like(wide, module)))
    model.update_modules(tree_unflatten(stand_ins))
    layers = [layer for _, layer in stand_ins]
    if sum(4 * layer.weight.size * 32 // layer.bits for layer in layers) <= KEPT_BYTES:
        for layer in layers:
            layer._kept = widen(layer)  # underscored: no parameter, in no file


def remove_wide_products(model: nn.Module) -> None:
    """Let every quantized layer multiply packed, as MLX's own do."""
    own = {wide: plain for plain, wide in _WIDE.items()}
    found = [(path, module) for path, module in model.named_modules() if type(module) in own]
    plain = [(path, _like(own[type(module)], module)) for path, module in found]
    for _, layer in plain:
        layer.pop("_kept", None)
    model.update_modules(tree_unflatten(plain))


def output_rows(layer: nn.Module, start: int, stop: int) -> nn.Module:
    """The linear or embedding layer with only these rows of its weight (outputs start..stop)."""
    part = _like(type(layer), layer)
    for name in ("weight", "scales", "biases", "bias"):
        if name in layer and layer[name] is not None:
            part[name] = layer[name][start:stop]
    if "_kept" in layer:
        part._kept = layer._kept[start:stop]
    return part


def taken_rows(layer: nn.Module, rows: mx.array) -> mx.array:
    """These rows (n,) of the weight of a linear or embedding layer, (n, in) float32."""
    part = _like(type(layer), layer)
    for name in ("weight", "scales", "biases", "_kept"):
        if name in layer and layer[name] is not None:
            part[name] = layer[name][rows]
    return _wide(part)


def multiply(layer: nn.Module, x: mx.array) -> mx.array:
    """x (..., in) times the weight's transpose, without the bias: (..., out) in x's dtype."""
    if not isinstance(layer, QUANTIZED):
        return x @ layer.weight.T
    if _packed(layer, x.size // x.shape[-1]):
        return _packed_product(layer, x, transpose=True)
    dtype = _product_dtype(x)
    return (x.astype(dtype) @ _wide(layer, dtype).T).astype(x.dtype)


def multiply_back(layer: nn.Module, y: mx.array) -> mx.array:
    """y (..., out) times the weight: (..., in) in y's dtype. The gradient of multiply."""
    if not isinstance(layer, QUANTIZED):
        return y @ layer.weight
    if _packed(layer, y.size // y.shape[-1]):
        return _packed_product(layer, y, transpose=False)
    dtype = _product_dtype(y)
    return (y.astype(dtype) @ _wide(layer, dtype)).astype(y.dtype)


def widens(layer: nn.Module) -> bool:
    """Whether a product with many rows widens the layer's weight, for as long as it takes."""
    return isinstance(layer, _WIDE_KINDS) and "_kept" not in layer


def _packed_product(layer: nn.Module, x: mx.array, transpose: bool) -> mx.array:
    return mx.quantized_matmul(
        x,
        layer.weight,
        layer.scales,
        layer.get("biases"),
        transpose=transpose,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


def _packed(layer: nn.Module, rows: int) -> bool:
    """Whether so many rows are multiplied with the packed weight."""
    if not isinstance(layer, _WIDE_KINDS):
        return True
    return bool(rows < MANY_ROWS and layer.get("_kept") is None)


def _wide(layer: nn.Module, dtype: mx.Dtype = mx.float32) -> mx.array:
    return layer["_kept"].astype(dtype) if "_kept" in layer else widen(layer, dtype)


def _product_dtype(x: mx.array) -> mx.Dtype:
    """The type to multiply in: BLAS, on the CPU, knows no half precision."""
    return mx.float32 if on_cpu() else x.dtype


class WideQuantizedLinear(nn.QuantizedLinear):
    """QuantizedLinear whose product with many rows goes through float32 BLAS."""

    def __call__(self, x: mx.array) -> mx.array:
        if _packed(self, x.size // x.shape[-1]):
            return super().__call__(x)
        y = _product(self, x)
        return y + self["bias"] if "bias" in self else y


class WideQuantizedEmbedding(nn.QuantizedEmbedding):
    """QuantizedEmbedding that, as a head over many rows, goes through float32 BLAS."""

    def as_linear(self, x: mx.array) -> mx.array:
        if _packed(self, x.size // x.shape[-1]):
            return super().as_linear(x)
        return _product(self, x)


class WideQuantizedSwitchLinear(QuantizedSwitchLinear):
    """Experts that, for many rows, are widened together and gathered in float32."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if _packed(self, indices.size):
            return super().__call__(x, indices, sorted_indices)
        y = _gathered_product(self, x, indices, sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


_WIDE: dict[type, type[nn.Module]] = {
    nn.QuantizedLinear: WideQuantizedLinear,
    nn.QuantizedEmbedding: WideQuantizedEmbedding,
    QuantizedSwitchLinear: WideQuantizedSwitchLinear,
}
_WIDE_KINDS: tuple[type[nn.Module], ...] = tuple(_WIDE.values())


_UNQUANTIZED: dict[type, type[nn.Module]] = {
    nn.QuantizedLinear: nn.Linear,
    nn.QuantizedEmbedding: nn.Embedding,
    QuantizedSwitchLinear: SwitchLinear,
    QuantizedMultiLinear: MultiLinear,
}


def _like(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """A module of another class that shares the parameters and settings of this one."""
    twin: nn.Module = kind.__new__(kind)  # type: ignore[call-overload]
    nn.Module.__init__(twin)
    twin.__dict__.update(module.__dict__)
    for name, value in module.items():
        twin[name] = value
    return twin


def _product(layer: Any, x: mx.array) -> Any:
    """x (..., in) times the layer's weight transposed: (..., out) in x's dtype."""

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return multiply(layer, x)

    @product.vjp
    def product_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return multiply_back(layer, cotangent)

    return product(x)


def _gathered_product(layer: Any, x: mx.array, indices: mx.array, in_order: bool) -> mx.array:
    """x (..., 1, in) times each row's expert: (..., 1, out). gather_mm on CPU is float32 only."""
    dtype = _product_dtype(x)
    weight = mx.stop_gradient(_wide(layer, dtype)).swapaxes(-1, -2)
    y = mx.gather_mm(x.astype(dtype), weight, rhs_indices=indices, sorted_indices=in_order)
    return y.astype(x.dtype)
