"""Requests: what OpenAI's clients send, each fault by its field, and nothing but WireError."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as openai_completions
from openai.types.chat import completion_create_params as openai_chats

from mlxlora.serve.wire.refusals import WireError, error_body
from mlxlora.serve.wire.requests import REFUSED, ChatRequest, CompletionRequest, parse
from mlxlora.serve.wire.tools import Choice

TURNS = [{"role": "user", "content": "hi"}]
CHAT = {"model": "m", "messages": TURNS}
TEXT = {"model": "m", "prompt": "a"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def chat(**fields):
    return parse(json.dumps({**CHAT, **fields}).encode(), ChatRequest)


def text(**fields):
    return parse(json.dumps({**TEXT, **fields}).encode(), CompletionRequest)


def param(body, kind=ChatRequest):
    """The field that a refusal names."""
    with pytest.raises(WireError) as refusal:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode(), kind)
    error = error_body(refusal.value)["error"]
    assert refusal.value.status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] is None or error["message"].startswith(error["param"])
    return error["param"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"null", None),
        (b"\xff{}", None),
        (b'{"model": NaN}', None),
        (b'{"seed": -Infinity}', None),
        (b'{"temperature": 1e999}', None),
        (b'{"seed": ' + b"9" * 5000 + b"}", None),
        (b"[" * 100_000, None),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, None),
        (b'{"a":' * 70 + b"1" + b"}" * 70, None),
        (b'{"model": "a", "model": "b"}', "model"),
        (b'{"messages": [{"role": "user", "role": "tool"}]}', "role"),
        (b'{"model": "\\ud800"}', "model"),
        (b'{"messages": [{"content": "\\udfff."}]}', "messages.0.content"),
        (b'{"\\ud800": 1}', None),
    ],
)
def test_a_body_that_is_no_sound_object_is_refused(body, named):
    assert param(body) == named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": "3"}, "n"),
        ({"n": True}, "n"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stop": [3]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 1001}, "stop"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 11}, "repetition_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"xtc_threshold": 0.9}, "xtc_threshold"),
        ({"unknown": None}, "unknown"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_a_field_that_does_not_fit_is_named_by_both_kinds(fields, named):
    assert param({**CHAT, **fields}) == named
    assert param({**TEXT, **fields}, CompletionRequest) == named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [3]}, "messages.0"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [*TURNS, {"role": "bot", "content": "x"}]}, "messages.1.role"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages.0"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
            "messages.0.tool_call_id",
        ),
        ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages.0.audio"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"verbosity": "low"}, "verbosity"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            "tool_choice",
        ),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": {"a": 1}}}, "chat_template_kwargs"),
        ({"prompt": "a"}, "prompt"),
    ],
)
def test_a_field_of_a_chat_that_does_not_fit_is_named(fields, named):
    assert param({**CHAT, **fields}) == named


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_a_part_that_is_no_text_is_named_by_its_place(kind):
    parts = [{"type": "text", "text": "what is this"}, {"type": kind, kind: {"url": "x"}}]
    assert param({**CHAT, "messages": [{"role": "user", "content": parts}]}) == (
        "messages.0.content.1"
    )


@pytest.mark.parametrize(
    "arguments", ['{"a": 1', "[1]", "3", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}', 3]
)
def test_arguments_of_an_earlier_call_must_be_an_object(arguments):
    call = {**CALL, "function": {"name": "add", "arguments": arguments}}
    body = {**CHAT, "messages": [{"role": "assistant", "tool_calls": [call]}]}
    assert param(body) == "messages.0.tool_calls.0.function.arguments"


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, "a"], [True], {}, [[1.0]], [[["a"]]]])
def test_a_prompt_that_is_empty_or_mixed_is_refused(prompt):
    assert param({**TEXT, "prompt": prompt}, CompletionRequest) == "prompt"


def test_a_completion_refuses_what_it_cannot_do():
    assert param({**TEXT, "best_of": 3}, CompletionRequest) == "best_of"
    assert param({**TEXT, "echo": True, "logprobs": 1}, CompletionRequest) == "logprobs"
    assert param({**TEXT, "logprobs": 6}, CompletionRequest) == "logprobs"
    assert param({**TEXT, "logprobs": True}, CompletionRequest) == "logprobs"


def test_prompts_of_every_form_become_a_list():
    assert text(prompt="a").prompt == ["a"]
    assert text(prompt=["a", "b"]).prompt == ["a", "b"]
    assert text(prompt=[1, 2]).prompt == [[1, 2]]
    assert text(prompt=[[1], [2]]).prompt == [[1], [2]]


def test_null_is_as_if_nothing_were_said():
    fields = (set(ChatRequest.model_fields) | set(REFUSED)) - set(CHAT)
    assert chat(**dict.fromkeys(fields)) == chat()


def test_fields_without_effect_are_taken():
    taken = chat(
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        modalities=["text"],
        verbosity="medium",
    )
    assert taken.messages == chat().messages


def test_every_field_of_openai_is_known_or_refused_by_name():
    for params, kind in (
        (openai_chats.CompletionCreateParamsStreaming, ChatRequest),
        (openai_completions.CompletionCreateParamsStreaming, CompletionRequest),
    ):
        fields = {name for base in params.__mro__ for name in getattr(base, "__annotations__", ())}
        fields |= set(params.__required_keys__ | params.__optional_keys__)
        assert fields - set(REFUSED) <= set(kind.model_fields)


def test_a_conversation_reads_as_templates_want_it():
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief", "name": "boss"},
            {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "audio": None,
                "function_call": None,
                "annotations": [],
                "reasoning_content": "hm",
                "tool_calls": [CALL],
            },
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ]
    )
    system, user, assistant, tool = [message.plain() for message in request.messages]
    assert system == {"role": "system", "content": "be brief", "name": "boss"}
    assert user == {"role": "user", "content": "ab"}
    assert assistant["content"] == "" and assistant["reasoning_content"] == "hm"
    assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert tool == {"role": "tool", "content": "2", "tool_call_id": "1"}


def test_the_choice_of_tools():
    assert chat().choice == Choice("none")
    assert chat(tool_choice="auto").choice == Choice("none")
    assert chat(tools=[TOOL]).choice == Choice("auto")
    named = {"type": "function", "function": {"name": "add"}}
    assert chat(tools=[TOOL], tool_choice=named).choice == Choice("required", "add")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KINDS = st.sampled_from([ChatRequest, CompletionRequest])


@given(KINDS, st.data())
def test_random_fields_raise_nothing_but_wire_errors(kind, data):
    known = st.sampled_from(sorted({*kind.model_fields, *REFUSED}))
    body = {**(CHAT if kind is ChatRequest else TEXT)}
    body |= data.draw(st.dictionaries(known | st.text(max_size=5), JSON, max_size=5))
    try:
        parse(json.dumps(body).encode(), kind)
    except WireError as error:
        json.dumps(error_body(error), ensure_ascii=False).encode()


@given(KINDS, st.data())
def test_random_turns_raise_nothing_but_wire_errors(kind, data):
    names = st.sampled_from(["role", "content", "tool_calls", "name", "type", "text", "function"])
    roles = st.sampled_from(["user", "assistant", "tool", "text", "function"])
    turn = st.recursive(
        JSON | roles,
        lambda inner: st.dictionaries(names, inner | roles, max_size=4) | st.lists(inner),
        max_leaves=8,
    )
    body = {**CHAT, "messages": data.draw(st.lists(turn, max_size=3)), "tools": data.draw(turn)}
    try:
        parse(json.dumps(body).encode(), ChatRequest)
    except WireError as error:
        json.dumps(error_body(error), ensure_ascii=False).encode()


@given(st.binary(max_size=60), KINDS)
def test_random_bytes_raise_nothing_but_wire_errors(body, kind):
    with pytest.raises(WireError):
        parse(body, kind)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({**TEXT, "prompt": [1] * 500_001}, None),
        ({**TEXT, "prompt": [[1]] * 50_001}, None),
        ({**TEXT, "metadata": [{}] * 60_000}, None),
        ({**TEXT, **{f"f{i}": 1 for i in range(1000)}}, "f0"),
        ({**TEXT, "logit_bias": {str(i): 1 for i in range(10_001)}}, "logit_bias"),
        ({**CHAT, "messages": TURNS * 5000}, "messages"),
        ({**CHAT, "messages": [{"role": "user", "content": [{}] * 2000}]}, "messages.0.content"),
        ({**CHAT, "messages": [{"x": 1}] * 4000}, "messages.0.x"),
        ({**CHAT, "tools": [TOOL] * 129}, "tools"),
    ],
)
def test_a_body_in_too_many_pieces_is_refused(body, named):
    assert param(body, CompletionRequest if "prompt" in body else ChatRequest) == named
