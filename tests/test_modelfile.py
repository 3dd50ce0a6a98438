import json
import unicodedata

import pytest
from chat_templates import FAMILIES, tokenizer_of

from mlxlora.errors import ExportError
from mlxlora.export.ollama.modelfile import holds, modelfile, parameters, stops


def printable(character: str) -> bool:
    """Go's strconv.IsPrint: letters, marks, numbers, punctuation, symbols, and the space."""
    return character == " " or unicodedata.category(character)[0] in "LMNPS"


def unquoted(text: str) -> str | None:
    """What a value says; None while its quotes are open."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def parsed(text: str) -> list[tuple[str, str]]:
    """(command, value), read as ollama's parser/parser.go reads a Modelfile, rune by rune."""
    found, place = [], 0
    while place < len(text):
        end = place
        while not text[end].isspace():
            end += 1
        name, value, end = text[place:end].lower(), "", end + 1
        if name == "parameter":
            place, end = end, text.index(" ", end)
            name, end = text[place:end], end + 1
        while end < len(text):
            character, end = text[end], end + 1
            if character in "\r\n" and (done := unquoted(value.strip())) is not None:
                found.append((name, done))
                break
            if printable(character) or character in " \t\r\n":
                value += character
        else:
            raise AssertionError(f"{name} does not end")
        place = end
    return found


def written(template: str = "{{ .Prompt }}", **options) -> str:
    given = {"model": "m.gguf", "stops": [], "parameters": {}, **options}
    return modelfile(template, **given)


def test_every_line_is_read_as_it_was_meant():
    text = written(
        '"<|x|>"\n{{ .Content }}\n\n "a" ',
        adapter="a.gguf",
        system='Say "yes".\n\tOr ｜no▁"',
        stops=["<|im_end|>", "<end_of_turn>"],
        parameters={"temperature": 0.7, "num_ctx": 4096},
    )
    assert parsed(text) == [
        ("from", "./m.gguf"),
        ("adapter", "./a.gguf"),
        ("template", '"<|x|>"\n{{ .Content }}\n\n "a" '),
        ("system", 'Say "yes".\n\tOr ｜no▁"'),
        ("stop", "<|im_end|>"),
        ("stop", "<end_of_turn>"),
        ("temperature", "0.7"),
        ("num_ctx", "4096"),
    ]


@pytest.mark.parametrize("text", ['a"""\nb', "\u00a0", "a\u200bb", "a\r\n", "\x1b"])
def test_what_a_modelfile_cannot_hold_is_known(text):
    assert not holds(text)
    if "\n" not in text:
        assert parsed(f'TEMPLATE """{text}"""\n') != [("template", text)]
    with pytest.raises(ExportError, match="cannot hold"):
        written(text)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({}, {}, {}),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05},
            {"max_position_embeddings": 40960},
            {
                "temperature": 0.6,
                "top_p": 0.95,
                "top_k": 20,
                "repeat_penalty": 1.05,
                "num_ctx": 8192,
            },
        ),
        ({"do_sample": False, "temperature": 0.6}, {}, {"temperature": 0.0}),
        ({"top_k": None, "top_p": "a", "min_p": float("nan"), "temperature": True}, {}, {}),
        ({"top_k": 40.0}, {"text_config": {"max_position_embeddings": 512}}, None),
    ],
)
def test_options_are_those_of_the_model(generation, config, expected):
    if expected is None:
        expected = {"top_k": 40, "num_ctx": 512}
    found = parameters(generation, config)
    assert json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["<|im_end|>"]),
        ("llama 3", ["<|eot_id|>", "<|end_of_text|>"]),
        ("gemma", ["<end_of_turn>"]),  # <eos> looks like HTML; the GGUF has it
        ("llama 2", []),  # so does </s>
        ("phi 3", ["<|end|>", "<|endoftext|>"]),
    ],
)
def test_answers_stop_at_tokens_that_end_turns(name, expected, tmp_path):
    assert sorted(stops(tokenizer_of(tmp_path, FAMILIES[name]))) == sorted(expected)


def test_a_word_is_no_stop(tmp_path):
    tokenizer = tokenizer_of(tmp_path, FAMILIES["chatml"])
    tokenizer._tokenizer.add_tokens(["end"])
    tokenizer.add_eos_token("end")
    assert stops(tokenizer) == ["<|im_end|>"]
