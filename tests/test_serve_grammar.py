"""Answers held to a grammar: what they admit, and schemas that would cost too much."""

import functools
import json
import os
import re
import shutil
import sys
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from marks import MARKS, VOCABULARY, marked
from wire_fuzz import schemas

from mlxlora.errors import DataError
from mlxlora.serve.apart.process import Lost, Process
from mlxlora.serve.grammar.following import PROGRAM, Grammars
from mlxlora.serve.grammar.program import Program
from mlxlora.serve.grammar.texts import ANY_OBJECT, json_grammar
from mlxlora.serve.grammar.vocabulary import Vocabulary

SCHEMAS = int(os.environ.get("MLXLORA_SCHEMAS", "1000"))
MOST = 60  # tokens of an answer
NO_JSON = re.compile(r"\\ud|NaN|Infinity")  # such requests are refused as they are read
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"enum": ["up", "down"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}

FATAL = {"type": "integer", "minimum": -3e261, "maximum": -3e261}  # overflows the stack


@pytest.fixture(scope="module", params=[False, True], ids=["words", "special"])
def tokenizer(tmp_path_factory, request):
    return marked(tmp_path_factory.mktemp("marked"), special=request.param)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    made = Grammars(tokenizer)
    yield made
    made.close()


def admitted(grammar, tokens):
    """The tokens that may follow the prompt's and these."""
    logits = grammar(mx.array([1, 2, 3, *tokens], mx.int32), mx.zeros((1, VOCABULARY)))
    return set(np.flatnonzero(np.isfinite(np.array(logits[0]))).tolist())


def read(grammars, text, tokenizer, answer):
    """How much of an answer a grammar admits, and whether nothing may follow it."""
    grammar = grammars.grammar(text, 3)
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
    grammar, drawn = grammars.grammar(json_grammar(schema), 3), []
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
    grammar = grammars.grammar(json_grammar(POINT), 3)
    assert admitted(grammar, []) == {tokenizer.encode("{")[0]}


def test_thoughts_come_before_the_answer_if_at_all(grammars, tokenizer):
    held = grammars.texts.of_json(POINT, "possible")
    answer = '{"x":1,"y":"up"}'
    for whole in (answer, f'<think>\n{{"x": no</think>\n\n{answer}'):
        assert read(grammars, held, tokenizer, whole) == (whole, True)
    assert read(grammars, held, tokenizer, "hm") == ("", False)
    assert read(grammars, held, tokenizer, "<think>a</think>b")[0] == "<think>a</think>"


def test_a_thought_that_the_prompt_opened_is_closed_before_the_answer(grammars, tokenizer):
    held = grammars.texts.of_json(POINT, "open")
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
    held = grammars.texts.of_call({"go": POINT, "ask": other})
    for whole in (
        '{"name": "go", "arguments": {"x":1,"y":"up"}}',
        '{"name": "ask", "arguments": {"p": true}}',
    ):
        assert read(grammars, held, tokenizer, whole) == (whole, True)
    cut = '{"name": "ask", "arguments": {"'
    assert read(grammars, held, tokenizer, cut + 'x":1}}')[0] == cut
    native = grammars.texts.of_call({"ask": other}, "possible", "<tool_call>")
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
        {"type": "integer", "multipleOf": 999999937},  # takes gigabytes, and minutes
        FATAL,
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in "abcd"]} for i in "a" * 12]}
        | {"type": "object", "dependentSchemas": {}},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
        {"$ref": "#"},
        {"$ref": "http://localhost:1/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"const": "x" * 100_000},
        {"type": "integer", "minimum": 10**400},
        {"properties": {"a": {"const": -(10**4000)}}},
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_before_it_is_used(grammars, schema):
    with pytest.raises(DataError):
        grammars.check(json_grammar(schema))


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
    grammar, drawn = grammars.grammar(json_grammar(schema), 3), []
    for _ in range(20):
        allowed = admitted(grammar, drawn)
        if grammar.finished:
            break
        drawn.append(min(allowed))


def test_a_tokenizer_that_llguidance_does_not_know_is_said(tmp_path):
    tokenizer = marked(tmp_path)
    tokenizer._tokenizer = object()
    with pytest.raises(DataError, match="cannot hold answers"):
        Grammars(tokenizer).check(json_grammar(POINT))


def test_marks_are_tokens_of_the_test_tokenizer(tokenizer):
    assert [len(tokenizer.encode(mark)) for mark in MARKS] == [1] * 4


def test_an_answer_whose_grammar_is_too_much_fails_and_the_others_go_on(grammars, tokenizer):
    """Both are followed by one process, which ends over the one."""
    other = grammars.grammar(json_grammar(POINT), 3)
    tokens = tokenizer.encode('{"x":1,')
    assert admitted(other, tokens[:3]) == {tokens[3]}
    with pytest.raises(DataError, match="cannot be followed further: it takes more time or memory"):
        admitted(grammars.grammar(json_grammar(FATAL), 3), [])
    rest = tokenizer.encode('{"x":1,"y":"')
    assert admitted(other, rest) == {tokenizer.encode(c)[0] for c in "ud"}


def test_what_ended_is_followed_no_more(grammars):
    grammar = grammars.grammar(json_grammar(POINT), 3)
    assert admitted(grammar, [])
    grammar.close()
    with pytest.raises(Lost):
        grammars._following.ask(1.0, "step", grammar._number, [])
    grammar.close()  # of a process that knows nothing of it


def test_a_grammar_is_built_once_for_all_choices_of_a_request(tokenizer, monkeypatch):
    """And each goes its own way."""
    program, built = Program(Vocabulary.of(tokenizer).make()), []
    make = program._matcher
    monkeypatch.setattr(program, "_matcher", lambda text: built.append(text) or make(text))
    whole, cut = (tokenizer.encode(text) for text in ('{"x":1,"y":"up"}', '{"x":'))
    begun = [program.follow(number, json_grammar(POINT), []) for number in range(3)]
    assert len(built) == 1 and begun[0] == begun[1] == begun[2]
    assert program.step(0, whole)[:2] == ("", True)
    assert program.step(1, cut)[:2] == ("", False)
    assert program.step(2, []) == begun[2]
    assert program.follow(3, json_grammar({"type": "array"}), []) != begun[0]
    assert len(built) == 2


def test_closing_ends_the_processes_and_they_come_again(tokenizer):
    grammars = Grammars(tokenizer)
    grammars.check(json_grammar(POINT))
    running = [grammars._checking._running, grammars._following._running]
    assert all(process.poll() is None for process in running)
    grammars.close()
    assert all(process.poll() is not None for process in running)
    grammars.check(json_grammar(POINT))
    grammars.close()


def test_the_processes_end_with_the_one_that_asked(tokenizer, tmp_path):
    """However it ends."""
    process = Process(PROGRAM, lambda: Vocabulary.of(tokenizer))
    process.start()
    process._connection.close()
    assert process._running.wait(60) == 0


def test_a_process_that_ended_by_another_s_hand_is_no_fault_of_a_schema(grammars, tokenizer):
    grammar = grammars.grammar(json_grammar(POINT), 3)
    tokens = tokenizer.encode('{"x":1,')
    assert admitted(grammar, tokens[:2]) == {tokens[2]}
    for process in (grammars._checking, grammars._following):
        process.start()
        process._running.kill()
        process._running.wait()
    grammars.check(json_grammar(POINT))
    assert admitted(grammar, tokens[:3]) == {tokens[3]}


def test_where_no_process_can_be_started_nothing_but_its_request_fails(tokenizer, monkeypatch):
    grammars = Grammars(tokenizer)
    grammar = grammars.grammar(json_grammar(POINT), 3)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(OSError):
        grammars.check(json_grammar(POINT))
    with pytest.raises(OSError):
        admitted(grammar, [])
    grammar.close()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # it ends as it begins
    with pytest.raises(OSError):
        grammars.check(json_grammar(POINT))
    with pytest.raises(OSError):
        admitted(grammar, [])
    grammar.close()
    monkeypatch.undo()
    grammars.check(json_grammar(POINT))
    assert admitted(grammar, [])
    grammars.close()


def test_work_beyond_its_time_ends(tokenizer):
    process = Process(PROGRAM, lambda: Vocabulary.of(tokenizer))
    large = json_grammar({"type": "integer", "multipleOf": 10**6 + 3})
    with pytest.raises(Lost):
        process.ask(0.02, "check", large)
    assert process.ask(60.0, "check", json_grammar(POINT)) == ("",)
    process.close()


@pytest.mark.slow
def test_thousands_of_schemas_are_followed_or_refused(grammars, capsys):
    """Prints what became of them, with MLXLORA_SCHEMAS of them."""
    counts: Counter[str] = Counter()
    losses = grammars._following.losses

    def walk(grammar, choose):
        """Any answer, up to a length."""
        drawn = []
        for _ in range(MOST):
            allowed = sorted(admitted(grammar, drawn))
            if grammar.finished or not allowed:
                return
            drawn.append(choose(allowed))

    @settings(max_examples=SCHEMAS, deadline=None)
    @given(schemas, st.randoms(use_true_random=False))
    def follow(schema, random):
        assume(not NO_JSON.search(json.dumps(schema)))
        try:
            grammars.check(json_grammar(schema))
        except DataError as error:
            counts["ended" if "more time or memory" in str(error) else "refused"] += 1
            return
        grammar = grammars.grammar(json_grammar(schema), 3)
        try:
            walk(grammar, random.choice)
            counts["followed"] += 1
        except DataError:
            counts["given up on the way"] += 1
        finally:
            grammar.close()

    follow()
    assert counts["followed"] > counts.total() // 4
    with capsys.disabled():
        print(f"\n{counts.total():,} schemas: ", dict(counts), end="; ")
        print(f"processes lost over answers: {grammars._following.losses - losses}")
