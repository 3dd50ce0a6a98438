"""What a family's batches do wrong is found out; its requests are answered right all the same."""

from dataclasses import replace

import mlx.core as mx
import pytest
from architectures import model_of
from mlx_lm.models.cache import make_prompt_cache
from serving import ask
from zoo import FAMILIES

from mlxlora.base import Base
from mlxlora.errors import ModelError
from mlxlora.serve.batch.together import Together, together
from mlxlora.serve.engine import Engine, Options
from mlxlora.serve.orders import End

PROMPTS = [
    [1 + (7 * number + 3 * i) % 190 for i in range(length)]
    for number, length in enumerate((1, 20, 2, 37, 50, 17))
]
FEWER = {"mamba": Together(4, 1), "gemma2": Together(1, 1)}


def of(family: str, dense: Base) -> Base:
    """Its tiny model; the tokenizer is never asked to end an answer."""
    return replace(dense, model=model_of(family))


def greedy(model, prompt, count=16):
    """By the model itself, token by token."""
    caches, tokens, x = make_prompt_cache(model), [], mx.array([prompt])
    for _ in range(count):
        token = mx.argmax(model(x, cache=caches)[0, -1]).item()
        tokens.append(token)
        x = mx.array([[token]])
    return tokens


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "mamba", "gemma2", "gemma3_text"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (*FAMILIES, "qwen3_next", "lfm2")),
    ],
)
def test_answers_together_are_those_alone(dense, family):
    base = of(family, dense)
    wanted = [greedy(base.model, prompt) for prompt in PROMPTS]
    with Engine(base, options=Options(rows=4, prefill=16, context=400)) as engine:
        assert engine.together == FEWER.get(family, Together(4, 4))
        told = [ask(engine, prompt) for prompt in PROMPTS]
        assert [one.tokens for one in told] == wanted
        longer = [*PROMPTS[3], *wanted[3], 5, 6]
        again = ask(engine, longer)
        assert isinstance(again.wait(), End)
        assert again.last.cached_tokens == len(PROMPTS[3]) + len(wanted[3])
        assert again.tokens == greedy(base.model, longer)
        assert engine.health()["restarts"] == 0


def test_a_family_whose_caches_cannot_be_taken_apart_is_refused(dense, monkeypatch):
    def broken(self, index):
        raise TypeError("no such thing")

    monkeypatch.setattr("mlx_lm.models.cache.BatchKVCache.extract", broken)
    with pytest.raises(ModelError, match="cannot decode this model"):
        together(dense, 8)
