import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized
from mlx.utils import tree_flatten
from test_batches import example

from mlxlora.base import training_mode
from mlxlora.config import LoraConfig, TrainConfig
from mlxlora.data.batches import collate
from mlxlora.lora.attach import detach, new_layers
from mlxlora.train.optim import OPTIMIZERS, learning_rate, make_optimizer
from mlxlora.train.step import Stepper


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Compiled from the first update, as on a GPU."""
    monkeypatch.setattr("mlxlora.train.step.compile_from", lambda: 1)


EXAMPLES = [example(n, start=s) for n, s in ((5, 1), (9, 4), (12, 1), (17, 10), (3, 1), (20, 2))]
CUTS = [
    [(6, 32)],
    [(3, 32), (3, 32)],
    [(1, 20), (2, 24), (3, 32)],
    [(1, 32)] * 6,
    [(8, 64)],
]


def batches(cuts):
    start, made = 0, []
    for rows, length in cuts:
        made.append(collate(EXAMPLES[start : start + rows], (rows, length)))
        start += rows
    return tuple(made)


def stepper(base, dropout=0.0, **train) -> Stepper:
    detach(base.model)
    new_layers(base.model, LoraConfig(rank=4, dropout=dropout), 0)
    randomized(base.model)
    return Stepper(base.model, make_optimizer(TrainConfig(**train)), clip=1.0)


def weights(base) -> dict[str, mx.array]:
    return dict(tree_flatten(base.model.trainable_parameters()))


def after_updates(base, cuts, count=2, **options) -> tuple[list[float], dict[str, mx.array]]:
    one = stepper(base, **options)
    losses = []
    with training_mode(base.model):
        for update in range(1, count + 1):
            loss, norm, tokens, gradients = one.gradients(batches(cuts), 0, update)
            one.apply(gradients, norm, tokens, 1e-3)
            losses.append(loss)
    return losses, weights(base)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_compiling_from_any_update_changes_nothing_but_rounding(quantized, monkeypatch, optimizer):
    found = []
    for first in (1, 3, 99):
        monkeypatch.setattr("mlxlora.train.step.compile_from", lambda first=first: first)
        found.append(after_updates(quantized, CUTS[1], 5, dropout=0.3, optimizer=optimizer))
    (losses, reference), *others = found
    for other_losses, other in others:
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for path, value in reference.items():
            np.testing.assert_allclose(other[path], value, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("name", ["dense", "quantized", "experts"])
def test_any_cut_into_micro_batches_gives_the_same_update(name, request):
    base = request.getfixturevalue(name)
    losses, reference = after_updates(base, CUTS[0], optimizer="sgd")
    for cuts in CUTS[1:]:
        other_losses, other = after_updates(base, cuts, optimizer="sgd")
        assert np.allclose(losses, other_losses, rtol=1e-5)
        for key, value in reference.items():
            assert mx.allclose(value, other[key], rtol=1e-4, atol=1e-6), key


def test_the_loss_is_the_mean_over_supervised_tokens_only(dense):
    one = stepper(dense)
    loss, _, tokens, _ = one.gradients(batches([(6, 32)]), 0, 1)
    total = count = 0.0
    for item in EXAMPLES:  # by hand, row by row, in float64
        logits = np.array(dense.model(mx.array(item.tokens[None, :-1])))[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = logp[np.arange(len(logp)), item.tokens[1:]]
        total -= picked[item.mask[1:]].sum()
        count += item.mask[1:].sum()
    assert tokens == count
    assert abs(loss - total / count) < 1e-5


def test_one_trace_a_shape(dense):
    one = stepper(dense)
    for cuts in (*CUTS, *CUTS):
        one.gradients(batches(cuts), 0, 1)
    assert one.shapes == {shape for cuts in CUTS for shape in cuts}


def test_dropout_is_the_same_for_the_same_update_and_not_for_another(dense):
    one = stepper(dense, dropout=0.3)
    with training_mode(dense.model):
        first = one.gradients(batches(CUTS[1]), 0, 7)[0]
        mx.random.seed(123)
        assert one.gradients(batches(CUTS[1]), 0, 7)[0] == first
        assert one.gradients(batches(CUTS[1]), 0, 8)[0] != first
        assert one.gradients(batches(CUTS[1]), 1, 7)[0] != first


def test_a_step_that_is_not_finite_is_known_before_it_is_applied(dense):
    one = stepper(dense)
    key = next(iter(weights(dense)))
    module = dense.model.layers[0].self_attn.q_proj
    module.lora_b = module.lora_b * float("nan")
    loss, norm, _, _ = one.gradients(batches(CUTS[0]), 0, 1)
    assert not np.isfinite(loss) and not np.isfinite(norm)
    assert key in weights(dense)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_every_optimizer_lowers_the_loss(dense, optimizer):
    one = stepper(dense, optimizer=optimizer)
    rate = {"sgd": 0.5, "muon": 2e-2}.get(optimizer, 3e-3)
    losses = []
    with training_mode(dense.model):
        for _ in range(8):
            loss, norm, tokens, gradients = one.gradients(batches(CUTS[1]), 0, 1)
            one.apply(gradients, norm, tokens, rate)
            losses.append(loss)
    assert losses[-1] < losses[0] - 0.05


def test_the_global_norm_is_clipped(dense):
    one = stepper(dense, optimizer="sgd")
    one.clip = 1e-3
    before = weights(dense)
    _, norm, tokens, gradients = one.gradients(batches(CUTS[0]), 0, 1)
    one.apply(gradients, norm, tokens, 1.0)
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
