"""Structures of chat templates, and the TEMPLATEs made of them, beside Go's own engine."""

import pytest
from chat_templates import COUNTING, FAMILIES, IMPOSSIBLE, QWEN_DEFAULT, Family, tokenizer_of

from mlxlora.errors import ExportError
from mlxlora.export.ollama.compared import compare, conversations, rendered
from mlxlora.export.ollama.turns import Prober, Strip, find
from mlxlora.export.ollama.written import go_template

DIFFERENT = {  # conversations that these templates treat in a way of their own
    "always thinking": ["an answer with its thinking, to go on with"],
    "thinking, switched by the question": ["thinking turned off, two turns"],
    "llama 3, dated": ["a system message later on"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (prober, structure, TEMPLATE), each made once."""
    cache: dict = {}

    def of(name: str):
        if name not in cache:
            place = tmp_path_factory.mktemp("tokenizer")
            prober = Prober(tokenizer_of(place, FAMILIES[name]))
            turns = find(prober)
            cache[name] = prober, turns, go_template(turns)
        return cache[name]

    return of


def default(turns) -> str:
    return turns.system.default if turns.system else ""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_renders_every_conversation_as_the_chat_template_does(name, made):
    prober, turns, text = made(name)
    done = compare(prober, text, default(turns))
    assert done.different == DIFFERENT.get(name, []), done.first
    assert len(done.equal) + len(done.refused) + len(done.different) == len(conversations())
    assert len(done.equal) >= (20 if name == "gemma, no system" else 36)


@pytest.mark.parametrize("name", FAMILIES)
def test_go_renders_the_template_as_the_evaluator_does(name, made, go):
    _, turns, text = made(name)
    chats, expected = [], []
    for messages, options in conversations().values():
        for think in {None, options.get("enable_thinking")}:
            for system in {"", default(turns), "Speak like\na pirate."}:
                chats.append({"messages": messages, "system": system, "think": think})
                expected.append(rendered(text, messages, system, think))
    assert go(text, chats)["texts"] == expected


@pytest.mark.parametrize(
    "name", ["chatml, thinking", "always thinking", "thinking, switched by the question"]
)
def test_ollama_learns_from_the_template_what_stands_around_thinking(name, made, go):
    assert go(made(name)[2], [])["tags"] == ["<think>", "</think>"]


def test_thinking_is_turned_off_as_the_chat_template_does_it(made):
    text = made("chatml, thinking")[2]
    asked = [{"role": "user", "content": "Hi."}]
    assert rendered(text, asked).endswith("<|im_start|>assistant\n")
    assert rendered(text, asked, think=True).endswith("<|im_start|>assistant\n")
    assert rendered(text, asked, think=False).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("chatml", "own"),
        ("llama 3, dated", "own"),
        ("phi 3", "own"),
        ("llama 2", "first"),
        ("gemma", "first"),
        ("mistral, system last", "last"),
    ],
)
def test_it_is_seen_where_system_messages_go(name, kind, made):
    assert made(name)[1].system.kind == kind


def test_what_is_stripped_of_words_is_seen(made):
    everything = Strip(" \t\n\r\v\f", " \t\n\r\v\f")
    assert made("gemma")[1].user.strip == made("llama 3")[1].user.strip == everything
    assert made("gemma")[1].system.strip == made("chatml")[1].user.strip == Strip()
    llama = made("llama 2")[1]  # after the system's words, a user's are stripped at the end alone
    assert llama.user.strip == everything and llama.system.user_strip == Strip("", everything.right)


def test_a_default_system_message_is_seen(made):
    assert made("chatml, default system")[1].system.default == QWEN_DEFAULT
    assert made("llama 3, dated")[1].system.default == ""


def test_the_bos_that_the_tokenizer_adds_is_not_in_the_template(made):
    asked = [{"role": "user", "content": "Hi."}]
    assert rendered(made("llama 2")[2], asked) == "[INST] Hi. [/INST]"
    assert rendered(made("llama 2, bos not added")[2], asked) == "<s>[INST] Hi. [/INST]"
    assert "Ollama puts <s> first" in made("phi 3")[1].notes[0]
    assert made("llama 3")[1].notes == []


def test_what_no_structure_holds_is_said(made):
    assert "writes the date" in made("llama 3, dated")[1].notes[0]
    assert "no system role" in made("gemma, no system")[1].notes[0]


@pytest.mark.parametrize(
    ("name", "message"), [("shouting", "'<|user|>WHAT IS"), ("twice", "every message once")]
)
def test_a_template_that_cannot_be_said_is_refused(name, message, tmp_path):
    prober = Prober(tokenizer_of(tmp_path, IMPOSSIBLE[name]))
    with pytest.raises(ExportError) as caught:
        compare(prober, go_template(find(prober)))
    assert message in str(caught.value)


def test_conversations_that_come_out_different_are_named(tmp_path):
    prober = Prober(tokenizer_of(tmp_path, Family(COUNTING, ("<|end|>",), "<|end|>")))
    done = compare(prober, go_template(find(prober)))
    assert "one turn" in done.equal and "three turns" in done.different
    assert done.first.startswith("one turn, a system message: ") and "<|turn 3|>" in done.first
