"""Drawing for a whole batch, against numpy and mlx-lm's own samplers."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from mlxlora.serve.orders import Sampling
from mlxlora.serve.rows import Row, Rows
from mlxlora.serve.sampling import Sampler, processors

WORDS = 12


def logprobs(rows, seed=0):
    logits = 2 * mx.random.normal((rows, WORDS), key=mx.random.key(seed))
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def drawn(sampling, row, count=4000):
    """How often each token is drawn from these log-probabilities (WORDS,)."""
    rows = Rows()
    rows.let([Row(0, sampling, seed=n) for n in range(count)])
    tokens = Sampler(rows)(mx.broadcast_to(row, (count, WORDS)))
    return np.bincount(np.array(tokens), minlength=WORDS) / count


def allowed(row, temperature, top_k, top_p, min_p):
    """The distribution by definition, in float64."""
    heated = np.array(row, np.float64) / temperature
    share = np.exp(heated - heated.max())
    order = np.argsort(-share)
    if top_k:
        share[order[top_k:]] = 0
    share /= share.sum()
    before = np.cumsum(share[order]) - share[order]
    share[order[before >= top_p]] = 0
    share[share < min_p * share.max()] = 0
    return share / share.sum()


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_k": 100_000},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
        {"top_p": 1e-9},
    ],
)
def test_tokens_are_drawn_as_often_as_the_rules_say(rules):
    rules = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **rules}
    row = logprobs(1)[0]
    wanted = allowed(row, **rules)
    found = drawn(Sampling(**rules), row)
    assert (found[wanted == 0] == 0).all()
    assert np.abs(found - wanted).max() < 0.03


def test_a_row_draws_the_same_alone_and_in_company():
    values = logprobs(3)
    warm = Sampling(temperature=0.8, top_p=0.9)
    rows = Rows()
    sampler = Sampler(rows)
    rows.let([Row(0, Sampling(), 1), Row(0, warm, 7, drawn=4), Row(0, Sampling(1.0), 3)])
    together = sampler(values).tolist()
    rows.let([Row(0, warm, 7, drawn=4)])
    assert sampler(values[1:2]).tolist() == together[1:2]
    assert together[0] == mx.argmax(values[0]).item()


def test_draws_of_one_row_follow_each_other_without_repeating():
    rows = Rows()
    rows.let([Row(0, Sampling(temperature=1.0), 5)])
    sampler, flat = Sampler(rows), mx.zeros((1, 1000))
    assert len({sampler(flat).item() for _ in range(50)}) > 40


def test_penalties_are_of_what_was_generated():
    (penalize,) = processors(Sampling(presence=0.5, frequency=0.25))
    logits = mx.zeros((1, WORDS))
    tokens = [1, 1, 2]
    assert mx.array_equal(penalize(mx.array(tokens), logits), logits)
    for token in (3, 3, 4):
        tokens.append(token)
        changed = penalize(mx.array(tokens), logits)
    assert changed[0, :5].tolist() == [0, 0, 0, -1.0, -0.75]


def test_repetition_and_bias_are_mlx_lm_s():
    tokens, logits = mx.array([1, 5, 5]), logprobs(1) + 3
    theirs = make_logits_processors({2: 1.5, 7: -2.0}, repetition_penalty=1.3)
    expected, found = logits, logits
    for process in theirs:
        expected = process(tokens, mx.array(expected))
    for process in processors(Sampling(repetition=1.3, bias=((2, 1.5), (7, -2.0)))):
        found = process(tokens, found)
    assert mx.allclose(found, expected)


def test_nothing_is_processed_that_nobody_asked_for():
    assert processors(Sampling(temperature=1.0, top_p=0.5)) == []


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, 1e-300])
def test_a_temperature_that_float32_cannot_divide_by_is_greedy(temperature):
    row = logprobs(1)
    shares = drawn(Sampling(temperature, top_p=0.9), row, count=8)
    assert shares[mx.argmax(row).item()] == 1
