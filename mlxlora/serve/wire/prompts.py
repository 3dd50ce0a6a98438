"""From a request to orders: its prompt rendered, its choices numbered, its answer held."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_lm.tool_parsers import json_tools

from mlxlora.errors import DataError
from mlxlora.serve.grammar.texts import ANY_OBJECT, Thinking
from mlxlora.serve.orders import Order, Sampling
from mlxlora.serve.wire.abilities import knows_tools, thinking_of
from mlxlora.serve.wire.model import Model
from mlxlora.serve.wire.refusals import bad_field
from mlxlora.serve.wire.requests import ChatRequest, CompletionRequest, Request
from mlxlora.serve.wire.speech import Manner
from mlxlora.serve.wire.tokens import continued, rendered, room
from mlxlora.serve.wire.tools import Tool, arguments_schema

MOST_ORDERS = 128  # of one request
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio: choices' seeds lie far from each other


@dataclass(frozen=True)
class Chat:
    """The orders of a chat request, one a choice, and how their text is to be understood.

    holds: the field of the request that a grammar comes from, "" if none holds the answers.
    """

    orders: tuple[Order, ...]
    manner: Manner
    holds: str = ""


@dataclass(frozen=True)
class Completion:
    """The orders of a completion request: its choices for the first prompt, then the next's.

    prompts: for each order, the number of its prompt. echoes: what its text begins with.
    """

    orders: tuple[Order, ...]
    prompts: tuple[int, ...]
    echoes: tuple[str, ...]


def chat(request: ChatRequest, model: Model, adapter: str | None = None) -> Chat:
    """Raises WireError (400). Whether its grammar can be followed, check() tells."""
    tokenizer, choice = model.tokenizer, request.choice
    if not tokenizer.has_chat_template:
        raise bad_field("messages", "this model has no chat template; ask /v1/completions")
    tools = _tools(request, tokenizer)
    tokens = rendered(request, model, tools)
    thinking = thinking_of(tokenizer, tokens)
    native = tokenizer.tool_parser is json_tools.parse_tool_call
    grammar, holds = None, ""
    if choice.kind == "required":
        opening = tokenizer.tool_call_start if native else ""
        holds = "tools"
        grammar = _call_grammar(request, model, thinking, opening)
    elif request.response_format is not None and request.response_format.type != "text":
        holds = "response_format"
        grammar = _json_grammar(request, model, thinking)
    order = Order(
        tuple(tokens),
        adapter,
        room(request.most_tokens or model.defaults.max_tokens, len(tokens), model, "messages"),
        _sampling(request, model),
        tuple(request.stop),
        (request.top_logprobs or 0) if request.logprobs else None,
        grammar,
    )
    manner = Manner(
        thinking=thinking == "open",
        tools=tuple(tool.plain() for tool in tools),
        held=grammar is not None,
        calls=choice.kind == "required" and not native,
        several=request.parallel_tool_calls,
    )
    return Chat(tuple(_choices(order, request.n)), manner, holds)


def check(made: Chat, model: Model) -> None:
    """Raise WireError (400) for a grammar that cannot be followed. That may take a second."""
    grammar = made.orders[0].grammar
    if grammar is None:
        return
    try:
        model.grammars.check(grammar)
    except DataError as error:
        raise bad_field(made.holds, str(error)) from error


def completion(request: CompletionRequest, model: Model, adapter: str | None = None) -> Completion:
    """Raises WireError (400)."""
    return joined(list(continuations(request, model, adapter)))


def continuations(
    request: CompletionRequest, model: Model, adapter: str | None = None
) -> Iterator[Completion]:
    """Of each prompt by itself, so that others' can be read between two. Raises WireError (400)."""
    if len(request.prompt) * request.n > MOST_ORDERS:
        raise bad_field("prompt", f"{MOST_ORDERS} answers at most are given to one request")
    for number, prompt in enumerate(request.prompt):
        param = f"prompt.{number}" if len(request.prompt) > 1 else "prompt"
        tokens = continued(prompt, model, param)
        order = Order(
            tuple(tokens),
            adapter,
            room(request.max_tokens or model.defaults.completion_tokens, len(tokens), model, param),
            _sampling(request, model),
            tuple(request.stop),
            request.logprobs,
            continues=True,
        )
        text = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
        count, echo = request.n, text if request.echo else ""
        yield Completion(tuple(_choices(order, count)), (number,) * count, (echo,) * count)


def joined(parts: Sequence[Completion]) -> Completion:
    """What was read prompt by prompt, as one."""
    return Completion(
        tuple(order for part in parts for order in part.orders),
        tuple(number for part in parts for number in part.prompts),
        tuple(echo for part in parts for echo in part.echoes),
    )


def _tools(request: ChatRequest, tokenizer: Any) -> list[Tool]:
    """Those that the model is told of: with tool_choice "none", none."""
    choice = request.choice
    if choice.kind == "none":
        return []
    if not knows_tools(tokenizer):
        raise bad_field("tools", "this model's chat template knows no tools; leave them out")
    if choice.kind == "required":
        return request.tools
    if not tokenizer.has_tool_calling:
        raise bad_field(
            "tools",
            'mlx-lm does not know how this model writes calls: say tool_choice "required", or '
            "leave them out",
        )
    if request.response_format is not None and request.response_format.type != "text":
        raise bad_field(
            "response_format",
            'an answer that must be JSON cannot call tools: say tool_choice "none" or "required", '
            "or leave one of them out",
        )
    return request.tools


def _sampling(request: Request, model: Model) -> Sampling:
    unknown = next((t for t, _ in request.logit_bias if t >= model.vocabulary), None)
    if unknown is not None:
        raise bad_field(
            "logit_bias", f"there is no token {unknown}: ids are from 0 to {model.vocabulary - 1:,}"
        )

    def said(name: str) -> Any:
        value = getattr(request, name)
        return getattr(model.defaults, name) if value is None else value

    return Sampling(
        temperature=said("temperature"),
        top_p=said("top_p"),
        top_k=min(said("top_k"), model.vocabulary),
        min_p=said("min_p"),
        seed=request.seed,
        presence=request.presence_penalty,
        frequency=request.frequency_penalty,
        repetition=said("repetition_penalty"),
        bias=request.logit_bias,
    )


def _choices(order: Order, count: int) -> Iterator[Order]:
    """The order so many times, each with a seed of its own; the first with the request's."""
    seed = order.sampling.seed
    for number in range(count):
        if seed is None:
            yield order
        else:
            own = (seed + number * GOLDEN) % (1 << 64)
            yield replace(order, sampling=replace(order.sampling, seed=own))


def _json_grammar(request: ChatRequest, model: Model, thinking: Thinking) -> str:
    asked = request.response_format
    assert asked is not None
    schema = ANY_OBJECT if asked.json_schema is None else asked.json_schema.schema_
    if not schema:
        schema = ANY_OBJECT
    return _grammar(
        model, "response_format", lambda: model.grammars.texts.of_json(schema, thinking)
    )


def _call_grammar(request: ChatRequest, model: Model, thinking: Thinking, opening: str) -> str:
    name = request.choice.name
    schemas = {
        tool.function.name: arguments_schema(tool)
        for tool in request.tools
        if name in (None, tool.function.name)
    }
    return _grammar(
        model, "tools", lambda: model.grammars.texts.of_call(schemas, thinking, opening)
    )


def _grammar(model: Model, param: str, grammar: Callable[[], str]) -> str:
    if model.tokenizer.response_initial_state is not None:
        raise bad_field(param, "answers of this model have headers, and cannot be held to a form")
    try:
        return grammar()
    except DataError as error:
        raise bad_field(param, str(error)) from error
