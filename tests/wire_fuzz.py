"""Requests built from the wire format's own models: right, nearly right, and of no kind at all.

A field's strategy follows from its annotation; what validators make of it stands in SPECIAL.
"""

import json
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hostile import JSON_TEXTS, damaged, mutated, values
from hypothesis import strategies as st
from pydantic import BaseModel

from mlxlora.serve.http.app import LoadAdapter, UnloadAdapter
from mlxlora.serve.wire.requests import RESERVED, ChatRequest, CompletionRequest

MOST_TOKENS = 6  # of most answers, so that many are given
MODELS = ["tiny", "one", "two", "dora", "new", "new:2"]  # the last are loaded now and then
KINDS = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/load_lora_adapter": LoadAdapter,
    "/v1/unload_lora_adapter": UnloadAdapter,
}
ODD = [
    *("", " ", "\0", "\ufeff", "\u202e", "\ud800", "\udc00x", "👩‍👩‍👧", "e\u0301" * 50, "ﷺ" * 99),
    *("<|im_end|>", "<|im_start|>system\n", "<tool_call>", "</tool_call>", "<think>", "{{ 7*7 }}"),
    *("{% for x in range(10**9) %}{% endfor %}", "\x1b[2J", "a" * 3000, "x" * 200_000, "\r\n\r\n"),
]
ASKED = list(KINDS)[:2]
texts = st.text(max_size=12) | st.sampled_from(ODD)
PATTERNS = [
    *(
        "[a-z]+",
        "^(a+)+$",
        "(a|aa)+$",
        "(?=x)y",
        "(.*)*",
        "a{1,100000}",
        "(",
        "[",
        "\\1",
        "\\p{L}+",
    ),
    *("(a{1,99}){1,99}", "((a{0,99}){0,99}){0,99}", ".{65000}", "\\d{3}-\\d{4}", "^$", "(?i)x"),
    *("(?<=a)b", "[^\\x00-\\U0010FFFF]", "(x+x+)+y", "\\u{110000}", "*"),
]
FORMATS = ["date-time", "email", "uuid", "ipv6", "regex", "nonsense"]
DEEP: Any = {"type": "object", "properties": {"a": {"type": "integer"}}}
for _ in range(14):
    DEEP = {"type": "object", "properties": {"a": DEEP, "b": DEEP}, "required": ["a"]}
WHOLE = [  # schemas that make other programs wait, or fall over
    {"$ref": "#"},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$ref": "#/$defs/none"},
    {"$ref": "http://evil.example/schema"},
    {"$ref": "file:///etc/passwd"},
    {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"},
    {"allOf": [{"$ref": "#"}, {"type": "object"}]},
    {"not": {}},
    {"oneOf": [{"type": "integer"}] * 50},
    {"anyOf": []},
    {"enum": []},
    {"enum": [f"v{n}" * 9 for n in range(400)]},
    {"const": {"a": [1, None, 1e308]}},
    {"multipleOf": 1e-9, "type": "number"},
    {"multipleOf": 0, "type": "integer"},
    {"multipleOf": 0.1, "minimum": 1e300, "type": "number"},
    {"multipleOf": 7919, "type": "integer", "minimum": 10**12},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"type": "integer", "minimum": -(10**40), "maximum": 10**40},
    {"type": "array", "minItems": 10**9},
    {"type": "array", "uniqueItems": True, "maxItems": 10**6, "items": {"type": "string"}},
    {"type": "string", "minLength": 10**7},
    {"type": "object", "patternProperties": {"(a+)+$": {"type": "string"}}},
    {"type": "object", "minProperties": 1000},
    {"type": "object", "required": [f"k{n}" for n in range(500)]},
    {"if": {}, "then": {}, "else": False},
    {"allOf": [{"type": "string", "pattern": p} for p in ("^a*$", "^(ab)*$", "^b*$")]},
    {"properties": {"\ud800": {}}},
    {"type": ["object", "null", "nonsense"]},
    DEEP,
]
COMBINED = st.sampled_from(["anyOf", "oneOf", "allOf", "prefixItems"])
scalar_schemas = (
    st.sampled_from([{}, {"type": "null"}, {"type": "boolean"}, {"type": "number"}])
    | st.builds(lambda p: {"type": "string", "pattern": p}, st.sampled_from(PATTERNS))
    | st.builds(lambda f: {"type": "string", "format": f}, st.sampled_from(FORMATS))
    | st.builds(
        lambda a, b, c: {"type": "integer", "minimum": a, "maximum": b, "multipleOf": c},
        *(st.integers() | st.floats() for _ in range(3)),
    )
)
schemas = st.sampled_from(WHOLE) | st.recursive(
    scalar_schemas,
    lambda inner: (
        st.builds(lambda one: {"type": "array", "items": one}, inner)
        | st.builds(
            lambda each: {"type": "object", "properties": each, "required": list(each)},
            st.dictionaries(st.text(max_size=4), inner, max_size=3),
        )
        | st.builds(lambda all_, how: {how: all_}, st.lists(inner, max_size=3), COMBINED)
    ),
    max_leaves=5,
)
PLACES = [
    "team/third",
    "team",
    ".",
    "..",
    "../model",
    "/etc",
    "broken",
    "out",
    "round",
    "huge",
    "~",
]
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(MODELS),
    "prompt": (
        texts
        | st.lists(st.integers(-1, 260), max_size=9)
        | st.lists(texts | st.lists(st.integers(0, 258), max_size=4), max_size=3)
    ),
    "stop": texts | st.lists(texts, max_size=3),
    "logit_bias": st.dictionaries(
        st.integers(-1, 300).map(str), st.floats(-101, 101) | st.integers(-100, 100), max_size=4
    ),
    "tool_choice": (
        st.sampled_from(["none", "auto", "required", "any", {"type": "function"}])
        | st.sampled_from("fg").map(lambda n: {"type": "function", "function": {"name": n}})
    ),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from([*sorted(RESERVED), "enable_thinking", "x", "loop", "range", "__class__"]),
        texts | st.booleans() | st.integers() | values,
        max_size=3,
    ),
    "content": texts | st.lists(texts.map(lambda t: {"type": "text", "text": t}), max_size=3),
    "arguments": values.map(json.dumps) | texts,
    "schema": schemas,
    "parameters": schemas,
    "max_tokens": st.integers(1, MOST_TOKENS),
    "max_completion_tokens": st.integers(1, MOST_TOKENS),
    "n": st.integers(1, 3),
    "lora_name": st.sampled_from(["new", "new:2", "one", "tiny", "a/b", "../x"]) | texts,
    "lora_path": st.sampled_from(PLACES) | texts,
}
ALWAYS = ("max_tokens", "stream")  # said by nearly all requests


def one_in(count: int) -> st.SearchStrategy[bool]:
    """True so seldom. (Integers would prefer their ends.)"""
    return st.sampled_from([False] * (count - 1) + [True])


def within(kind: type, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Numbers in the bounds of a field."""
    bounds = {
        name: getattr(m, name)
        for m in metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(m, name)
    }
    least, most = bounds.get("ge", bounds.get("gt", -5)), bounds.get("le", bounds.get("lt", 9))
    if kind is int:
        return st.integers(least, min(least + 5, most - ("lt" in bounds))) | st.just(least)
    return st.floats(least + ("gt" in bounds) * 0.01, most)


def valid(annotation: Any, metadata: list[Any], tame: bool) -> st.SearchStrategy[Any]:
    """Values that fit an annotation; or, where not tame, nearly do."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return valid(inner[0], list(inner[1:]), tame)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, types.UnionType):
        kinds = [one for one in inner if one is not type(None)]
        return st.one_of([valid(one, metadata, tame) for one in kinds])
    if origin is list:
        return st.lists(valid(inner[0], [], tame), min_size=1, max_size=3)
    if origin is dict:
        return st.dictionaries(texts, values, max_size=3)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return st.deferred(lambda: fields_of(annotation, tame))
    if annotation in (int, float) and tame:
        return within(annotation, metadata)
    return {
        bool: st.booleans(),
        int: st.integers() | st.sampled_from([2**63 - 1, 2**64, -(2**63), 10**30, 1.0]),
        float: st.floats() | st.integers(-3, 3),
        str: texts,
    }.get(annotation, values)


TAME: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(MODELS[:4]),
    "prompt": st.text(min_size=1, max_size=50) | st.lists(st.integers(0, 258), min_size=1),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system"]), "content": st.text(max_size=30)}
        ),
        min_size=1,
        max_size=3,
    ),
    "stop": st.lists(st.text(min_size=1, max_size=2), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 258).map(str), st.floats(-9, 9), max_size=4),
    "tool_choice": st.sampled_from(["none", "auto"]),
    "chat_template_kwargs": st.just({"enable_thinking": False}),
    "tools": st.just([]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
}


@st.composite
def fields_of(draw: st.DrawFn, kind: type[BaseModel], tame: bool = False) -> dict[str, Any]:
    """An object of a model: all that is required, a few of the rest."""
    infos = {info.alias or name: info for name, info in kind.model_fields.items()}
    required = [name for name, info in infos.items() if info.is_required()]
    rest = [name for name in infos if name not in required]
    usual = [name for name in ALWAYS if name in infos]
    chosen = draw(st.lists(st.sampled_from(rest), max_size=4, unique=True)) if rest else []
    found = {}
    for name in dict.fromkeys(required + usual + chosen):
        special = {**SPECIAL, **TAME} if tame else SPECIAL
        info, fitting = infos[name], special.get(name)
        if fitting is None:
            fitting = valid(info.annotation, info.metadata, tame)
        found[name] = draw(values if not tame and draw(one_in(20)) else fitting)
    return found


@st.composite
def with_tools(draw: st.DrawFn) -> dict[str, Any]:
    """A chat whose answer is held to a grammar."""
    body = draw(fields_of(ChatRequest, tame=True))
    schema = draw(schemas)
    if draw(st.booleans()):
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    else:
        function = {"name": "f", "parameters": schema}
        body["tools"] = [{"type": "function", "function": function}]
        body["tool_choice"] = draw(st.sampled_from(["required", "auto", "none"]))
    return body


@dataclass(frozen=True)
class Asked:
    """A request, and how its client leaves. leave: bytes of the answer that it waits for."""

    path: str
    body: bytes
    leave: int | None = None
    cut: int | None = None  # bytes of the request that are sent

    @property
    def stays(self) -> bool:
        return self.leave is None and self.cut is None


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    path = draw(st.sampled_from([*ASKED, *ASKED, *KINDS, "grammar", "grammar"]))
    if path == "grammar":
        path, body = ASKED[0], draw(with_tools())
    else:
        body = draw(fields_of(KINDS[path], draw(st.booleans())))
    if draw(one_in(16)):
        body = draw(mutated(body))
    if draw(one_in(16)) and isinstance(body, dict):
        body[draw(st.text(max_size=9))] = draw(values)
    data = json.dumps(body).encode()
    if draw(one_in(24)):
        data = draw(damaged(data))
    if draw(one_in(40)):
        data = draw(st.sampled_from(JSON_TEXTS)).encode()
    if draw(one_in(40)):  # something said twice
        data = data[:-1] + b', "model": "one"}'
    leave = draw(st.sampled_from([None] * 9 + [0, 100, 600]))
    cut = draw(st.sampled_from([None] * 11 + [9, 150, 300]))
    return Asked(path, data, leave, cut)
