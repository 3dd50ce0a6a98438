"""A conversation on the engine, against answers to prompts rendered afresh."""

import json

import pytest
from serving import adapter_for

from mlxlora.chat import Conversation
from mlxlora.errors import AdapterError, DataError
from mlxlora.generate import answer, chat_tokens
from mlxlora.lora.attach import attach, detach
from mlxlora.serve.engine import Engine
from mlxlora.serve.orders import Sampling


@pytest.fixture
def tuned(dense):
    return adapter_for(dense, 1)


@pytest.fixture
def engine(dense, tuned):
    with Engine(dense, {"tuned": tuned}) as engine:
        yield engine


def said(conversation, text) -> str:
    return "".join(conversation.say(text))


def fresh(base, messages, adapter=None) -> str:
    """Another copy of the weights' answer would be the same; this one has them alone."""
    if adapter is not None:
        attach(base.model, adapter)
    text = answer(base.model, base.tokenizer, chat_tokens(base.tokenizer, messages), 10)
    detach(base.model)
    return text


def test_every_turn_is_answered_as_if_rendered_afresh_and_its_prefix_reused(engine):
    chat = Conversation(engine, "tuned", max_tokens=10, system="be brief")
    heard, reused = [], []
    for text in ("hello", "and then?", "why?"):
        heard.append(said(chat, text))
        reused.append(chat.reused > 20)
    assert reused == [False, True, True]
    base, adapter = engine.base, adapter_for
    engine.stop()
    messages = [{"role": "system", "content": "be brief"}]
    tuned = adapter(base, 1)
    for text, expected in zip(("hello", "and then?", "why?"), heard, strict=True):
        messages.append({"role": "user", "content": text})
        assert fresh(base, messages, tuned) == expected
        messages.append({"role": "assistant", "content": expected})


def test_reset_and_switching_start_over_and_go_on(engine):
    chat = Conversation(engine, max_tokens=10)
    bare = said(chat, "hello")
    said(chat, "more")
    chat.reset()
    assert said(chat, "hello") == bare
    chat.use("tuned")
    assert len(chat.history) == 2
    chat.reset()
    assert said(chat, "hello") != bare
    with pytest.raises(DataError, match="there are: tuned"):
        chat.use("nobody")


def test_an_adapter_trained_on_plain_text_continues_plain_text(dense, engine, tuned):
    import dataclasses

    for kind, raw in (("text", True), ("chat", False)):
        told = dataclasses.replace(tuned, provenance={"data": {"format": kind}})
        Conversation(engine).add(kind, told)
        assert Conversation(engine).continues(kind) is raw
    assert Conversation(engine, raw=True).continues("chat")
    chat = Conversation(engine, "text", max_tokens=4)
    assert said(chat, "abc")
    assert chat.history == []


def test_an_answer_cut_off_joins_the_history(engine):
    chat = Conversation(engine, max_tokens=200)
    pieces = chat.say("hello")
    heard = next(pieces)
    pieces.close()
    assert chat.history[-1] == {"role": "assistant", "content": heard}
    assert said(chat, "go on") is not None
    assert engine.vitals.counters.cancelled == 1


def test_what_is_too_long_to_answer_does_not_join_the_history(engine):
    conversation = Conversation(engine)
    said(conversation, "hi")
    before = list(conversation.history)
    with pytest.raises(DataError, match="a prompt has"):
        said(conversation, "long " * engine.room.context)
    assert conversation.history == before


def test_sampling_is_seeded(engine):
    hot = Sampling(temperature=2.0, seed=4)
    first = said(Conversation(engine, sampling=hot, max_tokens=10), "x")
    assert said(Conversation(engine, sampling=hot, max_tokens=10), "x") == first


def test_an_adapter_that_does_not_fit_leaves_the_one_in_use(engine, experts):
    chat = Conversation(engine, "tuned", max_tokens=10)
    before = said(chat, "hello")
    with pytest.raises(AdapterError):
        chat.add("bad", adapter_for(experts, 2))
    chat.reset()
    assert (chat.name, said(chat, "hello")) == ("tuned", before)


def test_several_are_compared_and_the_first_is_remembered(engine):
    alone = {n: said(Conversation(engine, n, max_tokens=10), "hello") for n in ("tuned", None)}
    chat = Conversation(engine, max_tokens=10)
    heard = {"tuned": "", None: ""}
    names = list(heard)
    for number, piece in chat.compare("hello", names):
        heard[names[number]] += piece
    assert heard == alone
    assert chat.history[-1]["content"] == alone["tuned"]


def test_a_conversation_is_saved_as_a_row_and_loaded_again(engine, tmp_path):
    chat = Conversation(engine, max_tokens=5, system="be brief")
    with pytest.raises(DataError, match="nothing has been said"):
        Conversation(engine).save(tmp_path / "empty.jsonl")
    said(chat, "hello")
    file = tmp_path / "chat.jsonl"
    assert chat.save(file) == 3
    (line,) = file.read_text().splitlines()
    assert [m["role"] for m in json.loads(line)["messages"]] == ["system", "user", "assistant"]
    again = Conversation(engine)
    assert again.load(file) == 3
    assert (again.system, again.history) == (chat.system, chat.history)


@pytest.mark.parametrize("text", ["[]", "{}", '{"messages": [1]}', '{"messages": [{"role": 1}]}'])
def test_what_is_no_conversation_is_not_loaded(engine, tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError):
        Conversation(engine).load(tmp_path / "x.jsonl")
