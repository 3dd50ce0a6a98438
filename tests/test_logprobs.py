import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from memory import peak

from mlxlora.quantized import install_wide_products
from mlxlora.train import logprobs
from mlxlora.train.head import Head
from mlxlora.train.logprobs import block_size, target_logprobs, target_logprobs_only

WORDS, WIDTH, COUNT = 1000, 24, 37
random = np.random.default_rng(3)
WEIGHT = random.normal(size=(WORDS, WIDTH))
BIAS = random.normal(size=WORDS)
HIDDEN = random.normal(size=(COUNT, WIDTH))
TARGETS = random.integers(0, WORDS, COUNT)
COTANGENT = random.normal(size=COUNT)


def in_float64(scale: float, cap: float, hidden=HIDDEN) -> tuple[np.ndarray, np.ndarray]:
    """(log p, gradient of sum(COTANGENT log p) with respect to hidden), by hand."""
    products = (hidden @ WEIGHT.T + BIAS) * scale
    logits = cap * np.tanh(products / cap) if cap else products
    slope = scale * ((1 - (logits / cap) ** 2) if cap else np.ones_like(logits))
    top = logits.max(-1, keepdims=True)
    normal = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    rows = np.arange(len(hidden))
    d_logits = -np.exp(logits - normal)
    d_logits[rows, TARGETS] += 1
    gradient = (COTANGENT[:, None] * d_logits * slope) @ WEIGHT
    return (logits - normal)[rows, TARGETS], gradient


def head(scale=1.0, cap=0.0) -> Head:
    layer = nn.Linear(WIDTH, WORDS)
    layer.weight, layer.bias = mx.array(WEIGHT, mx.float32), mx.array(BIAS, mx.float32)
    return Head(nn.Module(), "lm_head", layer, scale, cap)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 5.0)])
@pytest.mark.parametrize("block", [64, 192, WORDS])
def test_logprobs_and_gradient_are_those_in_float64(monkeypatch, scale, cap, block):
    monkeypatch.setattr(logprobs, "block_size", lambda head, count: block)
    wanted, wanted_gradient = in_float64(scale, cap)
    hidden, targets = mx.array(HIDDEN, mx.float32), mx.array(TARGETS)

    def loss(hidden):
        return (target_logprobs(head(scale, cap), hidden, targets) * mx.array(COTANGENT)).sum()

    np.testing.assert_allclose(
        target_logprobs(head(scale, cap), hidden, targets), wanted, atol=2e-5
    )
    only = target_logprobs_only(head(scale, cap), hidden, targets)
    np.testing.assert_allclose(only, wanted, atol=2e-5)
    np.testing.assert_allclose(mx.grad(loss)(hidden), wanted_gradient, atol=5e-5)


def test_large_logits_do_not_overflow():
    hidden = mx.array(HIDDEN * 100, mx.float32)
    found = target_logprobs(head(), hidden, mx.array(TARGETS))
    np.testing.assert_allclose(found, in_float64(1.0, 0.0, HIDDEN * 100)[0], rtol=1e-5, atol=1e-3)


def test_one_block_of_logits_exists_at_a_time():
    words, count = 200_000, 256  # whole logits would be 205 MB
    layer = nn.Linear(8, words, bias=False)
    hidden, targets = mx.random.normal((count, 8)), mx.zeros(count, mx.int32)
    mx.eval(layer.weight, hidden, targets)
    one = Head(nn.Module(), "lm_head", layer)
    gradient = mx.grad(lambda h: target_logprobs(one, h, targets).sum())
    assert peak(lambda: mx.eval(gradient(hidden))) < 110e6


def test_a_head_that_has_to_be_widened_is_so_in_parts_however_few_states_there_are():
    words, width, count = 400_000, 512, 4  # widened, the whole weight would be 819 MB
    layer = nn.QuantizedLinear(width, words, bias=False, bits=4)
    model = nn.Module()
    model.head = layer
    install_wide_products(model)
    hidden, targets = mx.random.normal((count, width)), mx.zeros(count, mx.int32)
    mx.eval(model.parameters(), hidden, targets)
    one = Head(model, "head", model.head)
    assert block_size(one, count) < words // 2
    gradient = mx.grad(lambda h: target_logprobs(one, h, targets).sum())
    assert peak(lambda: mx.eval(gradient(hidden))) < 400e6


def test_in_half_precision_it_is_as_near_as_the_arithmetic_allows():
    layer = nn.Linear(WIDTH, WORDS)
    layer.weight, layer.bias = mx.array(WEIGHT, mx.bfloat16), mx.array(BIAS, mx.bfloat16)
    hidden = mx.array(HIDDEN, mx.bfloat16)
    found = target_logprobs(Head(nn.Module(), "", layer), hidden, mx.array(TARGETS))
    assert found.dtype == mx.float32
    np.testing.assert_allclose(found, in_float64(1.0, 0.0)[0], atol=0.25)
