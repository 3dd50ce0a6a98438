"""The tokens of prompts, within the context; what is far too long is refused before it is cut."""

import json
from typing import Any

from mlxlora.base import check_tokens
from mlxlora.errors import DataError
from mlxlora.generate import chat_text, chat_tokens
from mlxlora.serve.wire.model import Model
from mlxlora.serve.wire.refusals import WireError, bad_field
from mlxlora.serve.wire.requests import ChatRequest
from mlxlora.serve.wire.tools import Tool

LETTERS = 64  # of a token on average, at most; more than a context of them need not be cut first
MANY = 4  # of a token on average, if so many fill a context: then it is cut bit by bit first
BIT = 1 << 16  # letters
BESIDE = ("reasoning", "name", "tool_call_id")  # texts of a turn that not all templates write


def rendered(request: ChatRequest, model: Model, tools: list[Tool]) -> list[int]:
    """The tokens of a chat. Raises WireError (400)."""
    words: dict[str, Any] = {}
    if request.reasoning_effort == "none":
        words["enable_thinking"] = False
    elif request.reasoning_effort is not None:
        words.update(enable_thinking=True, reasoning_effort=request.reasoning_effort)
    words |= request.chat_template_kwargs
    turns = [message.plain() for message in request.messages]
    told = [tool.plain() for tool in tools]
    calls = sum(len(json.dumps(turn.get("tool_calls", ""))) for turn in turns)
    said = calls + sum(len(turn["content"]) for turn in turns)
    beside = sum(len(turn.get(name, "")) for turn in turns for name in BESIDE)
    schemas = len(json.dumps(told))
    _check_length(said, model, "messages")
    _check_length(schemas, model, "tools")
    try:
        if said + beside + schemas > MANY * model.context:  # templates leave out what they like
            text = chat_text(model.tokenizer, turns, told or None, words)
            _check_cut(text, model, "messages")
        return chat_tokens(model.tokenizer, turns, told or None, words)
    except DataError as error:
        raise bad_field("messages", str(error)) from error


def continued(prompt: str | list[int], model: Model, param: str) -> list[int]:
    """The tokens of a completion's prompt. Raises WireError (400)."""
    if not isinstance(prompt, str):
        largest = max(prompt)
        if min(prompt) < 0 or largest >= model.vocabulary:
            raise bad_field(param, f"token ids are from 0 to {model.vocabulary - 1:,}")
        return prompt
    _check_cut(prompt, model, param)
    tokens = list(model.tokenizer.encode(prompt))
    if not tokens:
        raise bad_field(param, "it is empty to this model, so there is nothing to continue")
    try:
        check_tokens(model.tokenizer, tokens)
    except DataError as error:
        raise bad_field(param, str(error)) from error
    return tokens


def _check_length(letters: int, model: Model, param: str) -> None:
    if letters > LETTERS * model.context:
        raise _too_long(f"this has {letters:,} letters", model, param)


def _check_cut(text: str, model: Model, param: str) -> None:
    """Raise WireError for a text of so many tokens that cutting it would hold others up.

    Where it is cut into bits a token becomes two, but hardly twice as many in all.
    """
    _check_length(len(text), model, param)
    if len(text) <= MANY * model.context:
        return
    tokens = 0
    for begin in range(0, len(text), BIT):
        bit = text[begin : begin + BIT]
        tokens += len(model.tokenizer.encode(bit, add_special_tokens=False))
        if tokens > 2 * model.context:
            raise _too_long(f"this is more than {model.context:,} tokens", model, param)


def _too_long(what: str, model: Model, param: str) -> WireError:
    return bad_field(
        param,
        f"{what}, and the model's context has {model.context:,} tokens for prompt and answer "
        "together; shorten it",
        "context_length_exceeded",
    )


def room(wanted: int, prompt: int, model: Model, param: str) -> int:
    """Tokens that the answer may have."""
    if prompt >= model.context:
        raise _too_long(f"this is {prompt:,} tokens", model, param)
    return min(wanted, model.context - prompt)
