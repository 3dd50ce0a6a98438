import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import worst
from mlx.utils import tree_flatten
from mlx_lm.models.mla import QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mlxlora.machine import on_cpu
from mlxlora.quantized import QUANTIZED, install_wide_products, remove_wide_products, widen

MODES = [("affine", 64, 4), ("affine", 32, 8), ("affine", 64, 3), ("mxfp4", 32, 4)]
MODES += [("mxfp8", 32, 8), ("nvfp4", 16, 4)]


class Model(nn.Module):
    def __init__(self, mode: str, group_size: int, bits: int) -> None:
        super().__init__()
        settings = {"group_size": group_size, "bits": bits, "mode": mode}
        self.linear = nn.QuantizedLinear(128, 96, bias=True, **settings)
        self.head = nn.QuantizedEmbedding(64, 128, **settings)
        self.experts = QuantizedSwitchLinear(128, 32, 4, bias=False, **settings)

    def __call__(self, x, indices):
        routed = self.experts(mx.expand_dims(x, (-2, -3)), indices)
        return self.linear(x).square().sum() + self.head.as_linear(x).sum() + routed.sum()


@pytest.mark.skipif(not on_cpu(), reason="only the CPU multiplies widened")
@pytest.mark.parametrize("mode, group_size, bits", MODES)
@pytest.mark.parametrize("rows", [2, 32])
@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_wide_products_are_mlx_s_own_forward_and_backward(
    mode, group_size, bits, rows, kept, monkeypatch
):
    monkeypatch.setattr("mlxlora.quantized.KEPT_BYTES", kept)
    model = Model(mode, group_size, bits)
    x = mx.random.normal((rows, 128), key=mx.random.key(1))
    indices = mx.random.randint(0, 4, (rows, 2), key=mx.random.key(2))
    value, gradient = mx.value_and_grad(model)(x, indices)
    names = [path for path, _ in model.named_modules()]
    parameters = tree_flatten(model.parameters())
    install_wide_products(model)
    assert all(type(m) not in QUANTIZED for m in model.modules())
    assert [path for path, _ in model.named_modules()] == names
    assert [path for path, _ in tree_flatten(model.parameters())] == [p for p, _ in parameters]
    assert ("_kept" in model.linear) == (kept > 0)
    wide_value, wide_gradient = mx.value_and_grad(model)(x, indices)
    assert worst(wide_value, value) < 1e-5
    assert worst(wide_gradient, gradient) < 1e-5
    compiled, _ = mx.compile(mx.value_and_grad(model))(x, indices)
    assert worst(compiled, value) < 1e-5
    remove_wide_products(model)
    # Those of multi-latent attention are multiplied packed everywhere.
    assert {type(m) for m in model.modules()} - {Model} == {*QUANTIZED} - {QuantizedMultiLinear}
    assert mx.array_equal(mx.value_and_grad(model)(x, indices)[1], gradient)


@pytest.mark.parametrize("mode, group_size, bits", MODES)
def test_widen_is_mlx_s_dequantize(mode, group_size, bits):
    layer = Model(mode, group_size, bits).linear
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    expected = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **settings)
    assert mx.array_equal(widen(layer), expected.astype(mx.float32))
