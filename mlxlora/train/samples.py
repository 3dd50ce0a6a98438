"""Answers to eval.prompts with the present weights: what training changes, in words."""

from collections.abc import Iterator

from mlxlora.base import Base
from mlxlora.config import EvalConfig
from mlxlora.generate import answer, prompt_tokens
from mlxlora.train.events import Sample


def samples(base: Base, wanted: EvalConfig, update: int, *, raw: bool) -> Iterator[Sample]:
    """Answer each prompt greedily; raw: the prompt as it stands, without a chat template."""
    for prompt in wanted.prompts:
        tokens = prompt_tokens(base.tokenizer, prompt, raw=raw)
        text = answer(base.model, base.tokenizer, tokens, wanted.max_tokens)
        yield Sample(update, prompt, text)
