"""Answers held to a grammar: what they admit, and schemas that would cost too much."""

import functools
import json

import mlx.core as mx
import numpy as np
import pytest
from marks import MARKS, VOCABULARY, marked

from mlxlora.errors import DataError
from mlxlora.serve.grammar import ANY_OBJECT, Grammars, json_grammar

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"enum": ["up", "down"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=[False, True], ids=["words", "special"])
def tokenizer(tmp_path_factory, request):
    return marked(tmp_path_factory.mktemp("marked"), special=request.param)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer)


def admitted(grammar, tokens):
    """The tokens that may follow the prompt's and these."""
    logits = grammar(mx.array([1, 2, 3, *tokens], mx.int32), mx.zeros((1, VOCABULARY)))
    return set(np.flatnonzero(np.isfinite(np.array(logits[0]))).tolist())


def read(grammars, text, tokenizer, answer):
    """How much of an answer a grammar admits, and whether nothing may follow it."""
    grammar = grammars.compile(text, 3)
    tokens = tokenizer.encode(answer)
    for number, token in enumerate(tokens):
        if token not in admitted(grammar, tokens[:number]):
            return tokenizer.decode(tokens[:number]), False
    admitted(grammar, tokens)
    return answer, grammar.finished


@pytest.mark.parametrize(
    "schema",
    [ANY_OBJECT, POINT, {"type": "array", "items": {"type": "number"}, "maxItems": 3}],
)
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_drawn_is_json_by_the_schema(grammars, tokenizer, schema, seed):
    grammar, drawn = grammars.compile(json_grammar(schema), 3), []
    random = np.random.default_rng(seed)
    for _ in range(400):
        allowed = admitted(grammar, drawn)
        if grammar.finished or allowed & tokenizer.eos_token_ids:
            break
        closing = allowed & {tokenizer.encode(c)[0] for c in '"}]'}
        drawn.append(int(random.choice(sorted(closing or allowed))))
    value = json.loads(tokenizer.decode(drawn))
    if schema is POINT:
        assert type(value["x"]) is int and value["y"] in ("up", "down") and len(value) == 2
    else:
        assert isinstance(value, dict if schema is ANY_OBJECT else list)


def test_the_prompt_is_not_read(grammars, tokenizer):
    grammar = grammars.compile(json_grammar(POINT), 3)
    assert admitted(grammar, []) == {tokenizer.encode("{")[0]}


def test_thoughts_come_before_the_answer_if_at_all(grammars, tokenizer):
    held = grammars.of_json(POINT, "possible")
    answer = '{"x":1,"y":"up"}'
    for whole in (answer, f'<think>\n{{"x": no</think>\n\n{answer}'):
        assert read(grammars, held, tokenizer, whole) == (whole, True)
    assert read(grammars, held, tokenizer, "hm") == ("", False)
    assert read(grammars, held, tokenizer, "<think>a</think>b")[0] == "<think>a</think>"


def test_a_thought_that_the_prompt_opened_is_closed_before_the_answer(grammars, tokenizer):
    held = grammars.of_json(POINT, "open")
    whole = 'so {"x"</think>{"x":1,"y":"up"}'
    assert read(grammars, held, tokenizer, whole) == (whole, True)
    assert read(grammars, held, tokenizer, "a</think>b")[0] == "a</think>"


def test_a_call_is_of_one_of_the_functions_with_its_own_arguments(grammars, tokenizer):
    other = {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/P"}},
        "required": ["p"],
        "additionalProperties": False,
        "$defs": {"P": {"type": "boolean"}},
    }
    held = grammars.of_call({"go": POINT, "ask": other})
    for whole in (
        '{"name": "go", "arguments": {"x":1,"y":"up"}}',
        '{"name": "ask", "arguments": {"p": true}}',
    ):
        assert read(grammars, held, tokenizer, whole) == (whole, True)
    cut = '{"name": "ask", "arguments": {"'
    assert read(grammars, held, tokenizer, cut + 'x":1}}')[0] == cut
    native = grammars.of_call({"ask": other}, "possible", "<tool_call>")
    whole = '<think>a</think>\n\n<tool_call>\n{"name": "ask", "arguments": {"p": true}}'
    assert read(grammars, native, tokenizer, whole) == (whole, True)


def nested(count, wrap, inner):
    return functools.reduce(lambda schema, _: wrap(schema), range(count), inner)


DOUBLED = {
    f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]}
    for i in range(40)
} | {"d40": {"type": "integer"}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"properties": 3},
        {"type": "string", "pattern": "^((a{1000}){1000}){1000}$"},
        {"type": "string", "pattern": "("},
        {"type": "integer", "multipleOf": 999999937},
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in "abcd"]} for i in "a" * 12]}
        | {"type": "object", "dependentSchemas": {}},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
        {"$ref": "#"},
        {"$ref": "http://localhost:1/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"const": "x" * 100_000},
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_before_it_is_used(grammars, schema):
    with pytest.raises(DataError):
        grammars.compile(json_grammar(schema), 0)


@pytest.mark.parametrize(
    "schema",
    [
        nested(60, lambda s: {"type": "object", "properties": {"a": s}}, {"type": "integer"}),
        nested(5, lambda s: {"type": "array", "minItems": 1000, "items": s}, {"type": "integer"}),
        {"enum": [f"v{i}" for i in range(5000)]},
        {"type": "string", "minLength": 10**6},
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
        {"type": "string", "pattern": "(a|b)*a(a|b){40}"},
        {"$defs": DOUBLED, "$ref": "#/$defs/d0"},
    ],
)
def test_a_large_schema_is_followed_step_by_step(grammars, schema):
    grammar, drawn = grammars.compile(json_grammar(schema), 3), []
    for _ in range(20):
        allowed = admitted(grammar, drawn)
        if grammar.finished:
            break
        drawn.append(min(allowed))


def test_a_tokenizer_that_llguidance_does_not_know_is_said(tmp_path):
    tokenizer = marked(tmp_path)
    tokenizer._tokenizer = object()
    with pytest.raises(DataError, match="cannot hold answers"):
        Grammars(tokenizer).compile(json_grammar(POINT), 0)


def test_marks_are_tokens_of_the_test_tokenizer(tokenizer):
    assert [len(tokenizer.encode(mark)) for mark in MARKS] == [1] * 4
