"""An answer's text as content, reasoning and calls, however it is cut into pieces."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import marked
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder

from mlxlora.serve.wire.speech import Manner, Said, Speech

TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},)
ADD = '{"name": "add", "arguments": {"a": 1}}'
ONE = f"<tool_call>\n{ADD}\n</tool_call>"


def tokenizer(**changed):
    """What Speech asks of mlx-lm's wrapper of a tokenizer."""
    known = {
        "has_thinking": True,
        "think_start": "<think>",
        "think_end": "</think>",
        "has_tool_calling": True,
        "tool_call_start": "<tool_call>",
        "tool_call_end": "</tool_call>",
        "tool_parser": json_tools.parse_tool_call,
        "structural_markers": (),
        "response_transitions": {},
        "response_initial_state": None,
    }
    return SimpleNamespace(**{**known, **changed})


def hear(pieces, manner=None, reason="stop", **changed):
    """(content, reasoning, [(name, arguments)], finish_reason) of an answer in pieces."""
    speech = Speech(tokenizer(**changed), manner)
    said = [speech.feed(piece) for piece in pieces]
    said.append(speech.end())
    calls = [(call.name, json.loads(call.arguments)) for one in said for call in one.calls]
    content = "".join(one.content for one in said)
    return content, "".join(one.reasoning for one in said), calls, speech.reason(reason)


def test_the_double_of_a_tokenizer_has_what_the_wrapper_has(tmp_path):
    real, double = marked(tmp_path), vars(tokenizer())
    assert {name: getattr(real, name) for name in double} == double


@pytest.mark.parametrize(
    ("text", "manner", "heard"),
    [
        ("plain  ", Manner(), ("plain  ", "", [], "stop")),
        (" led", Manner(), (" led", "", [], "stop")),
        ("<think>\nhm\n</think>\n\nyes", Manner(), ("yes", "hm", [], "stop")),
        ("hm</think>yes", Manner(thinking=True), ("yes", "hm", [], "stop")),
        ("never done", Manner(thinking=True), ("", "never done", [], "stop")),
        ("a < b", Manner(tools=TOOLS), ("a < b", "", [], "stop")),
        ("a <tool_c", Manner(tools=TOOLS), ("a <tool_c", "", [], "stop")),
        ("blank \n", Manner(tools=TOOLS), ("blank \n", "", [], "stop")),
        (ONE, Manner(tools=TOOLS), ("", "", [("add", {"a": 1})], "tool_calls")),
        (f"so:\n{ONE}\n", Manner(tools=TOOLS), ("so:", "", [("add", {"a": 1})], "tool_calls")),
        (f"{ONE}\n{ONE}", Manner(tools=TOOLS), ("", "", [("add", {"a": 1})] * 2, "tool_calls")),
        (
            f"{ONE}\n{ONE}",
            Manner(tools=TOOLS, several=False),
            ("", "", [("add", {"a": 1})], "tool_calls"),
        ),
        (ONE, Manner(), (ONE, "", [], "stop")),
        (f"<think>{ONE}</think>ok", Manner(), ("ok", ONE, [], "stop")),
        (
            f"<think>hm</think>\n\n{ONE}",
            Manner(tools=TOOLS),
            ("", "hm", [("add", {"a": 1})], "tool_calls"),
        ),
    ],
)
@given(data=st.data())
@settings(max_examples=20)
def test_what_is_heard_however_the_text_is_cut(text, manner, heard, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert hear(pieces, manner) == heard
    assert hear(text, manner) == heard


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot json\n</tool_call> and more",
        "<tool_call>[1, 2]</tool_call>",
        '<tool_call>{"name": "add"}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        '<tool_call>\n{"name": "add", "argum',
        "<tool_call>",
    ],
)
def test_a_call_that_cannot_be_read_becomes_content(text):
    assert hear([text], Manner(tools=TOOLS)) == (text, "", [], "stop")


def test_a_call_that_is_whole_but_not_closed_is_a_call():
    text = f"<tool_call>\n{ADD}"
    assert hear([text], Manner(tools=TOOLS))[2] == [("add", {"a": 1})]
    assert hear([text], Manner(tools=TOOLS), "length")[3] == "length"


def test_arguments_in_a_string_are_those_in_it():
    text = '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>'
    assert hear([text], Manner(tools=TOOLS))[2] == [("add", {"a": 1})]


def test_arguments_can_always_be_written():
    speech = Speech(tokenizer(), Manner(tools=TOOLS))
    said = speech.feed('<tool_call>{"name": "add", "arguments": {"a": "\\ud800é"}}</tool_call>')
    assert said.calls[0].arguments.encode() and json.loads(said.calls[0].arguments)


def test_other_parsers_of_mlx_lm_are_used():
    coder = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    parser = {"tool_parser": qwen3_coder.parse_tool_call}
    assert hear(coder, Manner(tools=TOOLS), **parser)[2] == [("add", {"a": "1"})]
    marks = {
        "tool_parser": mistral.parse_tool_call,
        "tool_call_start": mistral.tool_call_start,
        "tool_call_end": mistral.tool_call_end,
    }
    several = '[TOOL_CALLS]add[ARGS]{"a": 1}add[ARGS]{"a": 2}'
    assert hear(several, Manner(tools=TOOLS), **marks)[2] == [("add", {"a": 1}), ("add", {"a": 2})]
    assert hear("[TOOL_CALLS]add[AR", Manner(tools=TOOLS), **marks)[0] == "[TOOL_CALLS]add[AR"


HELD = json.dumps({"name": "add", "arguments": {"a": "<think></tool_call><tool_call>"}})


def test_marks_in_what_a_grammar_holds_are_words():
    call = [("add", {"a": "<think></tool_call><tool_call>"})]
    alone = Manner(tools=TOOLS, held=True, calls=True)
    assert hear(HELD, alone) == ("", "", call, "tool_calls")
    assert hear(f"<think>hm</think>\n{HELD}", alone) == ("", "hm", call, "tool_calls")
    opened = Manner(thinking=True, tools=TOOLS, held=True, calls=True)
    assert hear(f"hm</think>\n{HELD}", opened) == ("", "hm", call, "tool_calls")
    native = Manner(tools=TOOLS, held=True)
    for pieces in (f"<tool_call>\n{HELD}", ["<think>hm</think>\n<tool_call>", "\n", HELD]):
        assert hear(pieces, native)[2:] == (call, "tool_calls")
    assert hear(HELD, Manner(held=True)) == (HELD, "", [], "stop")
    assert hear([HELD], Manner(held=True), has_thinking=False) == (HELD, "", [], "stop")


def test_a_held_call_that_is_cut_short_is_content():
    alone = Manner(tools=TOOLS, held=True, calls=True)
    assert hear(HELD[:20], alone, "length") == (HELD[:20], "", [], "length")


def test_text_goes_out_as_soon_as_it_is_certain():
    speech = Speech(tokenizer(), Manner(tools=TOOLS))
    assert speech.feed("Hello") == Said("Hello")
    assert speech.feed(" <too") == Said()
    assert speech.feed("l>") == Said(" <tool>")
    assert not speech.feed("<think>")
    assert speech.feed("hm") == Said(reasoning="hm")


@given(st.text(st.sampled_from("ab <>/think\n"), max_size=40))
def test_without_marks_nothing_is_lost(text):
    bare = {"has_thinking": False, "has_tool_calling": False}
    assert hear(text, **bare)[0] == text
