import json

import pytest
from conftest import randomized

from mlxlora.base import load
from mlxlora.config import LoraConfig, RunConfig
from mlxlora.export.check import PROMPTS, compare, prompts_for
from mlxlora.export.speakers import InMLX, InTransformers, installed
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.fresh import new_layers
from mlxlora.train.loop import train


class Deaf(InMLX):
    """A program whose tokenizer loses the last token of what is not plain English."""

    def tokens(self, text, raw):
        found = super().tokens(text, raw)
        return found if text.isascii() else found[:-1]


def test_two_of_a_kind_say_the_same(dense):
    first = InMLX("first", dense.model, dense.tokenizer)
    prompts = prompts_for(dense, None)
    (found,) = compare(
        first, [lambda: InMLX("second", load(dense.path).model, dense.tokenizer)], prompts
    )
    assert (found.name, found.prompts) == ("second", len(PROMPTS))
    assert found.same_prompts == found.same_answers == len(PROMPTS)
    assert found.differing == () and found.example is None


def test_other_weights_and_other_tokens_are_told_apart(dense):
    other = load(dense.path)
    new_layers(other.model, LoraConfig(rank=4), 0)
    randomized(other.model)
    first = InMLX("first", dense.model, dense.tokenizer)
    prompts = prompts_for(dense, None)
    changed, deaf = compare(
        first,
        [
            lambda: InMLX("changed", other.model, dense.tokenizer),
            lambda: Deaf("deaf", dense.model, dense.tokenizer),
        ],
        prompts,
    )
    assert changed.same_prompts == len(PROMPTS) and changed.same_answers < len(PROMPTS)
    asked, ours, theirs = changed.example
    assert ours != theirs and asked in [text for text, _ in prompts]
    assert deaf.same_answers == len(PROMPTS)  # given the right tokens
    assert deaf.differing == tuple(text for text, _ in prompts if not text.isascii())


def test_prompts_are_rendered_as_the_model_is_asked(dense, dense_path, rows, tmp_path):
    texts = [text for text, raw in prompts_for(dense, None) if not raw]
    assert texts[0] == f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    run = {"model": str(dense_path), "out": str(tmp_path / "run"), "data": {"path": str(rows)}}
    for _ in train(RunConfig.from_dict({**run, "train": {"updates": 1}}), dense):
        pass
    own = prompts_for(dense, Adapter.load(tmp_path / "run" / "adapter"))
    asked = json.loads((rows / "valid.jsonl").read_text().splitlines()[0])["prompt"]
    assert asked in own[len(PROMPTS)][0] and len(own) == len(PROMPTS) + 4
    dense.tokenizer.has_chat_template = False
    assert prompts_for(dense, None)[1] == (PROMPTS[1], True)


@pytest.mark.parity
def test_transformers_says_what_mlx_says(dense):
    pytest.importorskip("torch")
    ends = set(dense.tokenizer.eos_token_ids)
    first = InMLX("first", dense.model, dense.tokenizer)
    (found,) = compare(first, [lambda: InTransformers(dense.path, ends)], prompts_for(dense, None))
    assert found.name.startswith("transformers 5")
    assert found.same_prompts == found.same_answers == len(PROMPTS)


def test_what_is_installed():
    assert installed("mlx", "pytest") and not installed("mlx", "no-such-package")
