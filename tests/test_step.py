from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized
from mlx.utils import tree_flatten
from test_batches import example

from mlxlora.base import training_mode
from mlxlora.config import LoraConfig, TrainConfig
from mlxlora.data.batches import pack, pad
from mlxlora.lora.attach import detach
from mlxlora.lora.fresh import new_layers
from mlxlora.train.forward import Forward
from mlxlora.train.optim import OPTIMIZERS, learning_rate, make_optimizer
from mlxlora.train.step import Stepper


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Compiled, as on a GPU."""
    monkeypatch.setattr("mlxlora.train.step.compiles", lambda: True)


EXAMPLES = [example(n, start=s) for n, s in ((5, 1), (9, 4), (12, 1), (17, 10), (3, 1), (20, 2))]
CUTS = {  # ways to cut the update: (rows of a micro-batch, how)
    "padded": [(6, pad)],
    "padded in two": [(3, pad), (3, pad)],
    "row by row": [(1, pad)] * 6,
    "padded in a shape": [
        (4, partial(pad, shape=(5, 32, 40))),
        (2, partial(pad, shape=(2, 24, 30))),
    ],
    "packed": [(6, pack)],
    "packed in two": [(2, pack), (4, pack)],
    "packed in a shape": [(6, partial(pack, shape=(1, 96, 60), reach=24))],
    "packed in two shapes": [
        (3, partial(pack, shape=(1, 32, 24), reach=24)),
        (3, partial(pack, shape=(1, 64, 40), reach=24)),
    ],
}


def batches(cut):
    start, made = 0, []
    for rows, how in CUTS[cut]:
        made.append(how(EXAMPLES[start : start + rows]))
        start += rows
    return tuple(made)


def stepper(base, dropout=0.0, clip=1.0, **train) -> Stepper:
    detach(base.model)
    new_layers(base.model, LoraConfig(rank=4, dropout=dropout), 0)
    randomized(base.model)
    return Stepper(base.model, make_optimizer(TrainConfig(**train)), clip)


def weights(base) -> dict[str, mx.array]:
    return dict(tree_flatten(base.model.trainable_parameters()))


def after_updates(base, cut, count=2, **options) -> tuple[list[float], dict[str, mx.array]]:
    one = stepper(base, **options)
    with training_mode(base.model):
        losses = [one.step(batches(cut), 0, n, 1e-3)[0] for n in range(1, count + 1)]
    return losses, weights(base)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_compiling_changes_nothing_but_rounding(quantized, monkeypatch, optimizer):
    options = {"count": 4, "dropout": 0.3, "optimizer": optimizer}
    losses, reference = after_updates(quantized, "packed in two", **options)
    monkeypatch.setattr("mlxlora.train.step.compiles", lambda: False)
    other_losses, other = after_updates(quantized, "packed in two", **options)
    assert other_losses == pytest.approx(losses, rel=1e-5)
    for path, value in reference.items():
        np.testing.assert_allclose(other[path], value, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("name", ["dense", "quantized", "experts"])
def test_any_cut_into_micro_batches_gives_the_same_update(name, request):
    base = request.getfixturevalue(name)
    losses, reference = after_updates(base, "row by row", optimizer="sgd")
    for cut in CUTS:
        other_losses, other = after_updates(base, cut, optimizer="sgd")
        assert np.allclose(losses, other_losses, rtol=1e-5), cut
        for key, value in reference.items():
            assert mx.allclose(value, other[key], rtol=1e-4, atol=1e-6), (cut, key)


@pytest.mark.parametrize("cut", ["padded", "packed"])
def test_the_loss_is_the_mean_over_supervised_tokens_only(dense, cut):
    one = stepper(dense)
    total = count = 0.0
    for item in EXAMPLES:  # by hand, row by row, in float64
        logits = np.array(dense.model(mx.array(item.tokens[None, :-1])))[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = logp[np.arange(len(logp)), item.tokens[1:]]
        total -= picked[item.mask[1:]].sum()
        count += item.mask[1:].sum()
    loss, _, tokens = one.step(batches(cut), 0, 1, 0.0)
    assert tokens == count
    assert abs(loss - total / count) < 1e-5


def test_one_trace_a_shape(dense, monkeypatch):
    traces = []
    plain = Forward.__call__
    monkeypatch.setattr(
        Forward, "__call__", lambda *a, **k: traces.append(a[1].shape) or plain(*a, **k)
    )
    one = stepper(dense)
    cuts = [cut for cut in CUTS if "shape" in cut]
    for cut in (*cuts, *cuts, *cuts):
        one.step(batches(cut), 0, 1, 1e-3)
    shapes = {batch.shape for cut in cuts for batch in batches(cut)}
    assert one.shapes == shapes
    assert len(traces) == len(shapes)


def test_dropout_is_the_same_for_the_same_update_and_not_for_another(dense):
    one = stepper(dense, dropout=0.3)
    with training_mode(dense.model):

        def loss(seed, update):
            return one.gradients(batches("packed in two"), seed, update)[0].item()

        first = loss(0, 7)
        mx.random.seed(123)
        assert loss(0, 7) == first
        assert loss(0, 8) != first
        assert loss(1, 7) != first


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_were(dense):
    one = stepper(dense)
    module = dense.model.layers[0].self_attn.q_proj
    module.lora_b = module.lora_b * float("nan")
    before = weights(dense)
    loss, norm, _ = one.step(batches("packed"), 0, 1, 1.0)
    assert not np.isfinite(loss) and not np.isfinite(norm)
    for key, value in weights(dense).items():
        assert mx.array_equal(value, before[key], equal_nan=True), key


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_optimizer_lowers_the_loss(dense, optimizer):
    one = stepper(dense, optimizer=optimizer)
    rate = {"sgd": 0.5, "muon": 2e-2}.get(optimizer, 3e-3)
    with training_mode(dense.model):
        losses = [one.step(batches("packed in two"), 0, 1, rate)[0] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05


def test_the_global_norm_is_clipped(dense):
    one = stepper(dense, clip=1e-3, optimizer="sgd")
    before = weights(dense)
    _, norm, _ = one.step(batches("packed"), 0, 1, 1.0)
    moved = mx.sqrt(sum(((weights(dense)[k] - before[k]) ** 2).sum() for k in before)).item()
    assert norm > 1e-3
    assert abs(moved - 1e-3) < 1e-5


def test_schedules_warm_up_and_fall_in_optimizer_updates():
    cosine = TrainConfig(warmup=0.1)
    rates = [learning_rate(cosine, 1.0, u, 100) for u in range(1, 101)]
    assert rates[0] == 0.1 and rates[9] == 1.0
    assert abs(rates[-1] - 0.1) < 1e-9
    assert rates[9:] == sorted(rates[9:], reverse=True)
    linear = TrainConfig(warmup=5, schedule="linear")
    assert learning_rate(linear, 1.0, 5, 10) == 1.0
    assert learning_rate(linear, 1.0, 10, 10) == pytest.approx(1 / 6)  # 0 comes after the end
    assert learning_rate(TrainConfig(warmup=0, schedule="constant"), 3.0, 1, 10) == 3.0
