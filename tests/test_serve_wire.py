"""Requests through the engine to answers: a random model, held to what was asked."""

import json

import pytest
from conftest import DENSE, write_model
from marks import TOOLS
from openai.types.chat import ChatCompletion
from serving import Told

from mlxlora.base import load
from mlxlora.serve.engine import Engine
from mlxlora.serve.wire.answers import head, usage
from mlxlora.serve.wire.chat_answers import ChatChoice, chat_completion
from mlxlora.serve.wire.model import Model
from mlxlora.serve.wire.prompts import chat
from mlxlora.serve.wire.requests import ChatRequest, parse
from mlxlora.serve.wire.speech import Speech
from mlxlora.serve.wire.spelling import Spelling

SCHEMA = {
    "type": "object",
    "properties": {"way": {"enum": ["up", "down"]}, "sure": {"type": "boolean"}},
    "required": ["way", "sure"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "go", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    base = load(write_model(tmp_path_factory.mktemp("models") / "tools", DENSE, TOOLS))
    with Engine(base) as engine:
        yield engine


def asked(engine, **fields):
    """The answer, read by OpenAI's own type."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    tokenizer = engine.base.tokenizer
    made = chat(
        parse(json.dumps(body).encode(), ChatRequest),
        Model(tokenizer, engine.room.context, engine.grammars),
    )
    told = [Told() for _ in made.orders]
    for order, sink in zip(made.orders, told, strict=True):
        engine.submit(order, sink)
    choices, ends = [], []
    for index, sink in enumerate(told):
        ends.append((0, sink.wait()))
        choice = ChatChoice(index, Speech(tokenizer, made.manner), Spelling(tokenizer))
        for piece in sink.pieces:
            choice.piece(piece)
        choice.end(ends[-1][1])
        choices.append(choice)
    answer = chat_completion(head("chatcmpl", "m", "f"), choices, usage(ends))
    return ChatCompletion.model_validate_json(json.dumps(answer), strict=True)


def valid(arguments):
    value = json.loads(arguments)
    assert set(value) == {"way", "sure"} and value["way"] in ("up", "down")
    assert type(value["sure"]) is bool


def test_an_answer_by_a_schema_is_json_by_it(engine):
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    answer = asked(engine, response_format=form, n=3, seed=1, temperature=1.5)
    for choice in answer.choices:
        valid(choice.message.content)
        assert choice.finish_reason == "stop"
    assert answer.usage.prompt_tokens < answer.usage.completion_tokens


@pytest.mark.parametrize("native", [True, False])
def test_a_required_call_is_made(engine, native, monkeypatch):
    if not native:
        monkeypatch.setattr(engine.base.tokenizer, "_tool_parser", None)
        monkeypatch.setattr(engine.base.tokenizer, "_tool_call_start", None)
    answer = asked(engine, tools=[TOOL], tool_choice="required", temperature=1.0, seed=3)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert call.function.name == "go" and choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    valid(call.function.arguments)


def test_log_probabilities_spell_the_answer(engine):
    (choice,) = asked(engine, logprobs=True, top_logprobs=3, max_tokens=20, stop=["zz"]).choices
    tokens = choice.logprobs.content
    spelled = bytes(byte for one in tokens for byte in one.bytes).decode(errors="replace")
    assert spelled == choice.message.content
    for one in tokens:
        assert len(one.top_logprobs) == 3
        assert one.logprob == max(top.logprob for top in one.top_logprobs)  # greedy


def test_an_answer_cut_short_by_its_limit_says_so(engine):
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    (choice,) = asked(engine, response_format=form, max_tokens=4).choices
    assert choice.finish_reason == "length" and choice.message.content.startswith("{")
