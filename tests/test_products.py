import mlx.nn as nn
import pytest

from mlxlora import products
from mlxlora.machine import on_cpu
from mlxlora.products import PACKED, WIDENED, choose_products
from mlxlora.quantized import WideQuantizedLinear


def layer(base) -> nn.Module:
    return base.model.layers[0].mlp.up_proj


def test_an_unquantized_base_has_nothing_to_choose(dense):
    assert choose_products(dense.model, 64) == ""


@pytest.mark.parametrize("fast", [PACKED, WIDENED])
def test_the_faster_way_is_taken(quantized, monkeypatch, fast):
    raced = []

    def time(layer, rows, dtype):
        raced.append((type(layer), rows))
        return 1.0 if (type(layer) is WideQuantizedLinear) == (fast == WIDENED) else 2.0

    monkeypatch.setattr(products, "_time", time)
    monkeypatch.setattr(products, "products_known", lambda: False)
    assert choose_products(quantized.model, 8) == fast
    assert raced == [(nn.QuantizedLinear, 8), (WideQuantizedLinear, 8)]
    assert (type(layer(quantized)) is WideQuantizedLinear) == (fast == WIDENED)


@pytest.mark.skipif(not on_cpu(), reason="a GPU may choose either")
def test_on_the_cpu_there_is_no_race(quantized, monkeypatch):
    """Its outcome would depend on what else the machine does, and with it a run's last bits."""
    monkeypatch.delattr(products, "_time")
    layers = [m for m in quantized.model.modules() if isinstance(m, nn.QuantizedLinear)]
    assert layers and choose_products(quantized.model, 2048) == WIDENED
    assert type(layer(quantized)) is WideQuantizedLinear
