"""Answers held to JSON: every sentence that is drawn is one, and hostile schemas are refused."""

import json

import mlx.core as mx
import pytest

from mlxlora.errors import DataError
from mlxlora.serve.grammar import ANY_OBJECT, Grammars, json_grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def written(grammars, grammar, tokenizer, seed, most=400):
    """A random sentence: text drawn from noise alone."""
    prompt = [65, 66]
    held = grammars.compile(grammar, len(prompt))
    tokens = list(prompt)
    for number in range(most):
        noise = mx.random.normal((1, 259), key=mx.random.key(1000 * seed + number))
        tokens.append(mx.argmax(held(mx.array(tokens), noise)).item())
        if tokens[-1] in tokenizer.eos_token_ids or held.finished:
            break
    ended = [t for t in tokens[len(prompt) :] if t not in tokenizer.eos_token_ids]
    return tokenizer.decode(ended)


@pytest.mark.parametrize("seed", range(6))
def test_noise_becomes_what_the_schema_describes(dense, seed):
    grammars = Grammars(dense.tokenizer)
    value = json.loads(written(grammars, json_grammar(PERSON), dense.tokenizer, seed))
    assert value.keys() == {"name", "age", "tags"}
    assert len(value["name"]) <= 8 and 0 <= value["age"] <= 150
    assert set(value["tags"]) <= {"a", "b"}


def test_any_object_begins_as_one(dense):
    text = written(Grammars(dense.tokenizer), json_grammar(ANY_OBJECT), dense.tokenizer, 1, 5)
    assert text.startswith("{")


@pytest.mark.parametrize("text", ['{"a":1}', '{"a": 1}', '{\n  "a": 1\n}'])
def test_usual_spaces_are_admitted_and_endless_ones_are_not(dense, text):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = json_grammar({**schema, "additionalProperties": False})
    held = Grammars(dense.tokenizer).compile(grammar, 0)
    assert held._matcher.consume_tokens(dense.tokenizer.encode(text))
    assert held.finished
    held = Grammars(dense.tokenizer).compile(grammar, 0)
    assert not held._matcher.consume_tokens(dense.tokenizer.encode("{" + " " * 30))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "no such type"},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.com/schema.json"},
        {"type": "string", "pattern": "("},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_its_reason(dense, schema):
    with pytest.raises(DataError, match=r"cannot be followed: \w"):
        Grammars(dense.tokenizer).compile(json_grammar(schema), 0)


def test_numbers_that_would_take_for_ever_are_refused():
    for schema in (
        {"type": "integer", "multipleOf": 99_999_937},
        {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
    ):
        with pytest.raises(DataError, match="multipleOf"):
            json_grammar(schema)


def test_one_that_grows_too_complex_ends_its_own_answer(dense):
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1500)}}
    held = Grammars(dense.tokenizer).compile(json_grammar(schema), 0)
    (brace,) = dense.tokenizer.encode("{")
    with pytest.raises(DataError, match="cannot be followed further"):
        held(mx.array([brace]), mx.zeros((1, 259)))


def test_depth_without_end_is_refused():
    schema = {"type": "integer"}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(DataError, match="recursion"):
        json_grammar(schema)


def test_a_huge_schema_is_not_even_read():
    with pytest.raises(DataError, match="at most"):
        json_grammar({"enum": ["x" * 70_000]})
