"""Our layers against mlx-lm's, on the same weights."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import worst
from mlx_lm.models.afm7 import FusedLinear
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner import dora, lora

from mlxlora.lora.layers import LoRAEmbedding, LoRALinear, LoRAMultiLinear, LoRASwitchLinear
from mlxlora.quantized import widen

RANK, SCALE = 4, 2.5


def linear(kind: str) -> nn.Module:
    layer = nn.Linear(64, 48, bias=True)
    if kind == "plain":
        return layer
    mode = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[kind]
    return nn.QuantizedLinear.from_linear(layer, *mode, mode=kind)


def pair(ours: type, theirs: type, base: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Our layer and mlx-lm's over one base, with the same random A and B."""
    a = ours(base, RANK, SCALE, 0.0)
    a.init(mx.random.key(0))
    a.lora_b = mx.random.normal(a.lora_b.shape, key=mx.random.key(1))
    b = theirs.from_base(base, r=RANK, scale=SCALE)
    assert (a.lora_a.shape, a.lora_b.shape) == (b.lora_a.shape, b.lora_b.shape)
    b.lora_a, b.lora_b = a.lora_a, a.lora_b
    return a, b


def fused(layer: nn.Module) -> mx.array:
    own = {name: layer[name] for name in ("lora_a", "lora_b", "m") if name in layer}
    return layer.merged(widen(layer.base), own, layer.scale)


@pytest.mark.parametrize("kind", ["plain", "affine", "mxfp4", "mxfp8", "nvfp4"])
def test_linear_is_mlx_lm_s(kind):
    ours, theirs = pair(LoRALinear, lora.LoRALinear, linear(kind))
    x = mx.random.normal((3, 7, 64))
    assert worst(ours(x), theirs(x)) < 1e-5
    # mlx-lm sums over the 4- and 8-bit float formats in bfloat16.
    rounding = 1e-5 if kind in ("plain", "affine") else 1e-2
    assert worst(fused(ours), theirs.fuse(dequantize=True).weight) < rounding


def test_embedding_is_mlx_lm_s_also_as_a_head():
    ours, theirs = pair(LoRAEmbedding, lora.LoRAEmbedding, nn.Embedding(50, 64))
    tokens, x = mx.array([[1, 2, 49]]), mx.random.normal((2, 64))
    assert worst(ours(tokens), theirs(tokens)) < 1e-5
    assert worst(ours.as_linear(x), theirs.as_linear(x)) < 1e-5
    assert worst(fused(ours), theirs.fuse().weight) < 1e-5


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_are_mlx_lm_s(quantized):
    base = SwitchLinear(64, 32, 4, bias=False)
    base = base.to_quantized(group_size=32, bits=8) if quantized else base
    ours, theirs = pair(LoRASwitchLinear, lora.LoRASwitchLinear, base)
    x = mx.random.normal((5, 1, 1, 64))
    indices = mx.array([[0, 1], [2, 3], [1, 1], [3, 0], [2, 2]])
    assert worst(ours(x, indices), theirs(x, indices)) < 1e-5
    assert worst(fused(ours), theirs.fuse(dequantize=True).weight) < 1e-5


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_a_matrix_a_head_is_adapted_both_ways_as_its_fused_weight(quantized, magnitude):
    base = MultiLinear(64, 32, 3)
    base = base.to_quantized(group_size=32, bits=4) if quantized else base
    ours = LoRAMultiLinear(base, RANK, SCALE, 0.0)
    ours.init(mx.random.key(0))
    ours.lora_b = mx.random.normal(ours.lora_b.shape, key=mx.random.key(1))
    if magnitude:
        ours.add_magnitude()
        ours.m = ours.m * mx.random.uniform(0.5, 2, ours.m.shape, key=mx.random.key(2))
    plain = MultiLinear(64, 32, 3)
    plain.weight = fused(ours)
    x = mx.random.normal((2, 3, 7, 64))
    assert worst(plain(x), base(x)) > 0.1
    back = plain(x)
    for settled in (False, True):
        if settled and magnitude:
            ours.settle()
        assert worst(ours(x), plain(x)) < 1e-5
        assert worst(ours(back, transpose=False), plain(back, transpose=False)) < 1e-5


@pytest.mark.parametrize("quantized", [False, True])
def test_a_layer_that_answers_in_parts_still_does(quantized):
    base = FusedLinear(64, [32, 16, 16])
    base = base.to_quantized(group_size=32, bits=4) if quantized else base
    ours = LoRALinear(base, RANK, SCALE, 0.0)
    ours.init(mx.random.key(0))
    ours.lora_b = mx.random.normal(ours.lora_b.shape, key=mx.random.key(1))
    plain = FusedLinear(64, [32, 16, 16])
    plain.weight = fused(ours)
    x = mx.random.normal((2, 7, 64))
    found, wanted = ours(x), plain(x)
    assert [part.shape for part in found] == [part.shape for part in wanted]
    for part, whole in zip(found, wanted, strict=True):
        assert worst(part, whole) < 1e-5


def with_magnitude(ours: nn.Module, theirs: nn.Module) -> None:
    """Make ours DoRA, and give both the same magnitudes, not those they begin with."""
    ours.add_magnitude()
    assert worst(ours.m, theirs.m) < 1e-5
    ours.m = theirs.m = ours.m * mx.random.uniform(0.5, 2, ours.m.shape, key=mx.random.key(2))


def gradients(layer: nn.Module, call) -> dict[str, mx.array]:
    def loss(own):
        layer.update(own)
        return (call(layer) ** 2).sum()

    own = {name: layer[name] for name in ("lora_a", "lora_b", "m")}
    found = mx.grad(loss)(own)
    layer.update(own)
    return found


@pytest.mark.parametrize("kind", ["plain", "affine"])
def test_dora_is_mlx_lm_s_with_its_gradients(kind):
    ours, theirs = pair(LoRALinear, dora.DoRALinear, linear(kind))
    with_magnitude(ours, theirs)
    x = mx.random.normal((3, 7, 64))
    assert worst(ours(x), theirs(x)) < 1e-5
    assert worst(fused(ours), theirs.fuse(dequantize=True).weight) < 1e-5
    expected = gradients(theirs, lambda layer: layer(x))
    for name, gradient in gradients(ours, lambda layer: layer(x)).items():
        assert worst(gradient, expected[name]) < 1e-5, name
    trained = ours(x)
    ours.settle()
    assert worst(ours(x), trained) < 1e-6


def test_dora_of_an_embedding_is_mlx_lm_s_also_as_a_head():
    ours, theirs = pair(LoRAEmbedding, dora.DoRAEmbedding, nn.Embedding(50, 64))
    with_magnitude(ours, theirs)
    tokens, x = mx.array([[1, 2, 49]]), mx.random.normal((2, 64))
    for settled in (False, True):
        assert worst(ours(tokens), theirs(tokens)) < 1e-5
        assert worst(ours.as_linear(x), theirs.as_linear(x)) < 1e-5
        assert worst(fused(ours), theirs.fuse().weight) < 1e-5
        if not settled:
            expected = gradients(theirs, lambda layer: layer(tokens))
            for name, gradient in gradients(ours, lambda layer: layer(tokens)).items():
                assert worst(gradient, expected[name]) < 1e-5, name
            ours.settle()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_of_experts_is_dora_of_each(quantized, bias):
    base = SwitchLinear(64, 32, 4, bias=bias)
    base = base.to_quantized(group_size=32, bits=8) if quantized else base
    layer = LoRASwitchLinear(base, RANK, SCALE, 0.0)
    layer.init(mx.random.key(0))
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    layer.add_magnitude()
    layer.m = layer.m * mx.random.uniform(0.5, 2, layer.m.shape, key=mx.random.key(2))
    x = mx.random.normal((5, 1, 1, 64))
    indices = mx.array([[0, 1], [2, 3], [1, 1], [3, 0], [2, 2]])
    for expert in range(4):
        one = nn.Linear(64, 32, bias=bias)
        one.weight = widen(base)[expert]
        if bias:
            one.bias = base.bias[expert]
        theirs = dora.DoRALinear.from_base(one, r=RANK, scale=SCALE)
        theirs.lora_a, theirs.lora_b = layer.lora_a[expert].T, layer.lora_b[expert].T
        theirs.m = layer.m[expert]
        for row, chosen in enumerate(indices.tolist()):
            for place, number in enumerate(chosen):
                if number == expert:
                    assert worst(layer(x, indices)[row, place], theirs(x[row, 0])) < 1e-5
        assert worst(fused(layer)[expert], theirs.fuse().weight) < 1e-5


@pytest.mark.parametrize("layer", [LoRALinear(nn.Linear(64, 48), RANK, SCALE, 0.0)])
def test_dora_never_makes_the_changed_weight(layer, monkeypatch):
    """The lengths come from products with r vectors: no array of the weight's size is made."""
    layer.init(mx.random.key(0))
    layer.add_magnitude()
    made = []
    matmul = mx.array.__matmul__

    def seen(a, b):
        made.append((y := matmul(a, b)).shape)
        return y

    monkeypatch.setattr(mx.array, "__matmul__", seen)
    layer.gain()
    assert made and (48, 64) not in made and (64, 48) not in made


def test_products_stay_in_the_activation_dtype():
    layer = LoRALinear(nn.Linear(64, 48), RANK, SCALE, 0.0)
    layer.base.set_dtype(mx.bfloat16)
    layer.init(mx.random.key(0))
    assert layer.lora_a.dtype == mx.float32
    assert layer(mx.ones((2, 64), mx.bfloat16)).dtype == mx.bfloat16


def test_a_fresh_layer_is_the_base():
    base = nn.Linear(64, 48)
    layer = LoRALinear(base, RANK, SCALE, 0.0)
    layer.init(mx.random.key(0))
    x = mx.random.normal((3, 64))
    assert mx.array_equal(layer(x), base(x))


def test_dropout_is_a_function_of_the_layer_s_key():
    layer = LoRALinear(nn.Linear(64, 48), RANK, SCALE, 0.5)
    layer.init(mx.random.key(0))
    layer.lora_b = mx.ones(layer.lora_b.shape)
    x = mx.random.normal((3, 64))
    layer.train()
    first = layer(x)
    mx.random.seed(99)
    assert mx.array_equal(layer(x), first)
    layer.dropout_key = mx.random.key(1)
    assert not mx.array_equal(layer(x), first)
    layer.eval()
    plain = layer.base(x) + SCALE * ((x @ layer.lora_a) @ layer.lora_b)
    assert worst(layer(x), plain) < 1e-6
