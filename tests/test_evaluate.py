import json

import numpy as np
import pytest
from conftest import randomized, write_rows

from mlxlora.config import DataConfig, LoraConfig
from mlxlora.data.formats import parse
from mlxlora.data.render import Renderer
from mlxlora.errors import DataError
from mlxlora.evaluation.evaluate import evaluate
from mlxlora.generate import answer, answer_all, chat_tokens
from mlxlora.lora.attach import detach
from mlxlora.lora.fresh import collect, new_layers


def test_loss_is_the_mean_over_supervised_tokens(dense, rows):
    import mlx.core as mx

    data = DataConfig(path=str(rows / "valid.jsonl"))
    result = next(evaluate(dense, data))
    total = count = 0.0
    for line in (rows / "valid.jsonl").read_text().splitlines():
        example = Renderer(dense.tokenizer, data)(parse(json.loads(line), {}))
        logits = np.array(dense.model(mx.array(example.tokens[None, :-1])))[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = logp[np.arange(len(logp)), example.tokens[1:]][example.mask[1:]]
        total, count = total - picked.sum(), count + len(picked)
    assert result.tokens == count
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(np.exp(total / count), rel=1e-4)


def test_base_and_adapters_are_named_and_the_base_is_clean_afterwards(dense, rows):
    new_layers(dense.model, LoraConfig(rank=2), 0)
    randomized(dense.model)
    adapter = collect(dense.model, LoraConfig(rank=2), {})
    detach(dense.model)
    data = DataConfig(path=str(rows))
    alone = next(evaluate(dense, data))
    both = list(evaluate(dense, data, [("a", adapter)], with_base=True))
    assert [result.name for result in both] == ["base", "a"]
    assert both[0].loss == alone.loss != both[1].loss
    assert [r.name for r in evaluate(dense, data, [("a", adapter)])] == ["a"]


def test_batched_answers_are_those_given_one_by_one(dense):
    prompts = [
        chat_tokens(dense.tokenizer, [{"role": "user", "content": text}])
        for text in ("a", "some longer prompt", "b c d")
    ]
    together = dict(answer_all(dense.model, dense.tokenizer, prompts, 12))
    alone = [answer(dense.model, dense.tokenizer, prompt, 12) for prompt in prompts]
    assert [together[i] for i in range(3)] == alone


def test_exact_match_compares_with_the_last_answer(dense, tmp_path):
    prompt = chat_tokens(dense.tokenizer, [{"role": "user", "content": "a"}])
    said = answer(dense.model, dense.tokenizer, prompt, 8)
    rows = [{"prompt": "a", "completion": said}, {"prompt": "a", "completion": "other"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    result = next(evaluate(dense, DataConfig(path=str(path)), generate=True, max_tokens=8))
    assert result.exact_match == 0.5
    assert [a.exact for a in result.answers] == [True, False]


def test_generating_needs_rows_with_an_answer(dense, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "abc"}])
    with pytest.raises(DataError, match="have none"):
        next(evaluate(dense, DataConfig(path=str(path)), generate=True))
