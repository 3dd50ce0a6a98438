"""The evaluator beside Go's own engine."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.export.ollama.literal import constant, literal
from mlxlora.export.ollama.template import GoTemplate, GoTemplateError

CHATS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", " a\n"), ("assistant", ""), ("user", "日本 {{ .X }}")],
]
TEMPLATES = {
    "text": "a }} b",
    "a field": "<{{ .System }}>",
    "a constant": r'{{ "a\n\t\"\\\x22\u00e9\U0001f600" }}',
    "if": "{{ if .System }}yes{{ else if .IsThinkSet }}set{{ else }}no{{ end }}",
    "range": "{{ range $i, $m := .Messages }}{{ $m.Role }}{{ $.System }}{{ .Content }}{{ end }}",
    "the last": "{{ range $i, $_ := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}"
    "{{ .Role }}{{ end }}{{ end }}",
    "a variable set inside": '{{ $s := "x" }}{{ if true }}{{ $s = "y" }}{{ end }}{{ $s }}',
    "a variable of an inner block": '{{ $s := "x" }}{{ if true }}{{ $s := "y" }}{{ end }}{{ $s }}',
    "and, or, not": '{{ if and (not .Think) (or .System "x") }}{{ or .System "none" }}{{ end }}',
    "only as far as needed": '{{ if and .System (eq (slice .System 0 2) "Be") }}B{{ end }}',
    "eq of many": '{{ range $i, $_ := .Messages }}{{ if eq .Role "a" "user" }}u{{ end }}'
    '{{ if ne .Role "user" }}n{{ end }}{{ end }}',
    "define": '{{ define "d" }}<{{ . }}>{{ end }}{{ template "d" .System }}',
    "recursion": '{{ define "r" }}{{ if . }}{{ slice . 0 1 }}.{{ template "r" (slice . 1) }}'
    '{{ end }}{{ end }}{{ template "r" .System }}',
}


def data(messages: list[tuple[str, str]]) -> dict:
    told = [{"Role": role, "Content": words, "Thinking": ""} for role, words in messages]
    system = "\n\n".join(words for role, words in messages if role == "system")
    return {"System": system, "Messages": told, "Think": False, "IsThinkSet": False}


def chat(messages: list[tuple[str, str]]) -> dict:
    return {"messages": [{"role": role, "content": words} for role, words in messages]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_evaluator_agrees_with_go(name, go):
    template = TEMPLATES[name]
    expected = go(template, [chat(messages) for messages in CHATS])["texts"]
    assert [GoTemplate(template).execute(data(messages)) for messages in CHATS] == expected


def test_literals_are_those_texts_in_go(go):
    texts = [
        "{",
        "{{",
        "a{{{b}}",
        '"""',
        '""""\n"',
        "\r\n",
        "\u00a0é\u200b｜▁",
        "\U0001f600",
        "\\n",
    ]
    for text in texts:
        piece = literal(text) + "{{ .System }}" + literal(text) + "{{ " + constant(text) + " }}"
        assert go(piece, [chat(CHATS[0])])["texts"] == [text * 3]


@settings(max_examples=300)
@given(st.text(), st.text())
def test_a_literal_is_its_text_whatever_follows(text, after):
    piece = literal(text) + "{{ .System }}" + literal(after)
    assert GoTemplate(piece).execute({"System": "."}) == text + "." + after
    assert '"""' not in literal(text) and '"""' not in constant(text)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ if .A }}", "no else or end"),
        ("{{ end }}", "end closes nothing"),
        ("{{- .A }}", "not understood"),
        ("{{ .A | len }}", "not understood"),
        ("{{ print .A }}", "not understood: print"),
        ("{{ range .A }}{{ end }}", "two variables"),
        ("{{ }}", "without words"),
        ("{{ (.A }}", "not closed"),
        ("{{ .B }}", "no field .B"),
        ("{{ $x }}", "no variable"),
        ("{{ len .A }}", "int is not text"),
        ("{{ slice .A 9 }}", "slice 9:1 of 1"),
        ('{{ define "d" }}{{ template "d" . }}{{ end }}{{ template "d" . }}', "too deeply"),
    ],
)
def test_what_is_not_known_is_refused(template, message):
    with pytest.raises(GoTemplateError, match=message.replace("(", r"\(")):
        GoTemplate(template).execute({"A": "a"})
