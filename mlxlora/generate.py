"""Prompts to text, greedily, with whatever is attached to the model: one streamed, or many at once.

mlx-lm does the decoding. Prompts are rendered by the same template as training rows, so
what was trained is what is asked.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, stream_generate

from mlxlora.base import check_tokens
from mlxlora.data.formats import Message
from mlxlora.errors import DataError, ModelError

BATCH = 32  # prompts decoded together


def chat_tokens(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Any = None,
    words: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation with an assistant turn opened.

    words: variables of the template, by name (enable_thinking, for one).
    """
    tokens = list(_templated(tokenizer, messages, tools, words, tokenize=True))
    if not tokens:
        raise DataError("the chat template renders this conversation as nothing at all")
    check_tokens(tokenizer, tokens)
    return tokens


def chat_text(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Any = None,
    words: Mapping[str, Any] | None = None,
) -> str:
    """What chat_tokens are the tokens of."""
    return str(_templated(tokenizer, messages, tools, words, tokenize=False))


def _templated(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Any,
    words: Mapping[str, Any] | None,
    tokenize: bool,
) -> Any:
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            add_generation_prompt=True,
            tokenize=tokenize,
            **(words or {}),
        )
    except Exception as error:  # templates raise through jinja whatever they like
        reason = str(error)[:400]
        raise DataError(f"the chat template refuses this conversation: {reason}") from error


def prompt_tokens(tokenizer: Any, prompt: str, *, raw: bool) -> list[int]:
    """Token ids of one prompt: as a user's turn, or raw text to be continued."""
    if raw or not tokenizer.has_chat_template:
        tokens = list(tokenizer.encode(prompt))
        if not tokens:
            raise DataError("the prompt is empty, so there is nothing to continue")
        check_tokens(tokenizer, tokens)
        return tokens
    return chat_tokens(tokenizer, [{"role": "user", "content": prompt}])


def stream(model: nn.Module, tokenizer: Any, tokens: list[int], max_tokens: int) -> Iterator[Any]:
    """mlx-lm's responses (.text, .token, .finish_reason, rates) to one prompt, greedily."""
    try:
        yield from stream_generate(model, tokenizer, tokens, max_tokens=max_tokens)
    except (TypeError, LookupError) as error:  # of mlx-lm's table of the tokens' spellings
        raise ModelError(
            "the model gave a token that its tokenizer cannot spell; they do not belong together"
        ) from error


def answer(model: nn.Module, tokenizer: Any, tokens: list[int], max_tokens: int) -> str:
    """The greedy answer to one prompt."""
    responses = stream(model, tokenizer, tokens, max_tokens)
    return "".join(response.text for response in responses)


def answer_all(
    model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], max_tokens: int
) -> Iterator[tuple[int, str]]:
    """(number of the prompt, greedy answer), as they finish, decoded in batches."""
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=BATCH,
        prefill_batch_size=BATCH,
    )
    try:
        numbers = {
            uid: number
            for number, uid in enumerate(
                generator.insert([list(p) for p in prompts], [max_tokens] * len(prompts))
            )
        }
        answers: dict[int, list[int]] = {uid: [] for uid in numbers}
        while responses := generator.next_generated():
            for response in responses:
                if response.finish_reason != "stop":
                    answers[response.uid].append(response.token)
                if response.finish_reason is not None:
                    yield numbers[response.uid], tokenizer.decode(answers.pop(response.uid))
    finally:
        generator.close()
