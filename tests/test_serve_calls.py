"""Calls read by mlx-lm's parsers: the same as by themselves, and never for long."""

import time
from types import SimpleNamespace

import pytest
from live_server import BASE, live
from mlx_lm.tool_parsers import gemma4, glm47, json_tools, laguna, longcat, pythonic, qwen3_coder

from mlxlora.serve.calls.reading import SHORT, Calls

LONG = "x" * 2 * SHORT
WRITTEN = {
    glm47: f"go<arg_key>a</arg_key><arg_value>{LONG}</arg_value>",
    laguna: f"go<arg_key>a</arg_key><arg_value>{LONG}</arg_value>",
    gemma4: f'call:go{{a:<|"|>{LONG}<|"|>}}',
    pythonic: f"[go(a='{LONG}')]",
    qwen3_coder: f"<function=go>\n<parameter=a>\n{LONG}\n</parameter>\n</function>",
    json_tools: f'{{"name": "go", "arguments": {{"a": "{LONG}"}}}}',
}
UNCLOSED = {  # these take minutes, or far longer
    glm47: "<arg_key>a</arg_key><arg_value>" * 20_000,
    longcat: "<longcat_arg_key>a</longcat_arg_key><longcat_arg_value>" * 20_000,
    gemma4: "call:a{" * 20_000,
}


@pytest.fixture
def calls():
    made = []

    def make(module):
        made.append(Calls(SimpleNamespace(tool_parser=module.parse_tool_call)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("module", WRITTEN, ids=lambda module: module.__name__.split(".")[-1])
def test_a_long_call_is_read_as_the_parser_reads_it(calls, module):
    text = WRITTEN[module]
    found = calls(module).read(text, [])
    assert found == module.parse_tool_call(text, [])
    assert found == {"name": "go", "arguments": {"a": LONG}}


@pytest.mark.parametrize("module", UNCLOSED, ids=lambda module: module.__name__.split(".")[-1])
def test_reading_ends_in_time_and_the_next_call_is_read(calls, module):
    reader, began = calls(module), time.monotonic()
    with pytest.raises(ValueError, match="too long"):
        reader.read(UNCLOSED[module], [])
    assert time.monotonic() - began < 30
    if module in WRITTEN:
        assert reader.read(WRITTEN[module], []) == module.parse_tool_call(WRITTEN[module], [])


@pytest.mark.parametrize("text", ["", LONG])
def test_what_is_no_call_is_said_to_be_none(calls, text):
    with pytest.raises(ValueError):
        calls(pythonic).read(text, [])


def test_a_tokenizer_without_calls_has_none_to_read():
    assert not Calls(SimpleNamespace(tool_parser=None)).slow


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_whose_calls_are_read_apart_answers_as_ever(tmp_path, monkeypatch, stream):
    monkeypatch.setattr(Calls, "slow", True)
    schema = {"properties": {"x": {"enum": [1]}}, "required": ["x"], "additionalProperties": False}
    function = {"name": "go", "parameters": schema}
    body = {
        "model": BASE,
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "stream": stream,
        "n": 2,
    }
    with live(tmp_path / "served") as server:
        answer = server.post("/v1/chat/completions", body)
    assert answer.status == 200
    assert answer.body.count(b'"name":"go"') == 2
