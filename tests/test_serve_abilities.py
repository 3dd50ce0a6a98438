"""What a model can be asked for, by its tokenizer and template."""

import pytest
from conftest import CHATML
from marks import OPENED, TOOLS, marked

from mlxlora.serve.wire.abilities import capabilities, knows_tools, thinking_of


@pytest.mark.parametrize(
    ("template", "marks", "found"),
    [
        (None, [], ["completions", "json"]),
        (CHATML, [], ["completions", "chat", "json"]),
        (CHATML, ["<think>", "</think>"], ["completions", "chat", "reasoning", "json"]),
        (TOOLS, [], ["completions", "chat", "tools", "json"]),
        ("{{ raise_exception('never') }}", [], ["completions", "chat", "json"]),
    ],
)
def test_capabilities_are_those_that_hold(tmp_path, template, marks, found):
    assert capabilities(marked(tmp_path, template, marks)) == found


def test_a_template_knows_tools_if_it_tells_of_them(tmp_path):
    assert knows_tools(marked(tmp_path, OPENED))


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ("a", "possible"),
        ("a<think>\n", "open"),
        ("a<think>\n\n</think>\n\n", "no"),
        ("<think>a</think>b", "possible"),
        ("what is <think> for", "possible"),
    ],
)
def test_only_the_end_of_a_prompt_tells_of_thinking(tmp_path, prompt, thinking):
    tokenizer = marked(tmp_path)
    assert thinking_of(tokenizer, tokenizer.encode(prompt)) == thinking
    assert thinking_of(tokenizer, []) == "possible"
