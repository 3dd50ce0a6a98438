import pytest
from conftest import randomized

from mlxlora.chat import Conversation
from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError
from mlxlora.generate import Sampling, answer, chat_tokens
from mlxlora.lora.attach import detach
from mlxlora.lora.fresh import collect, new_layers

GREEDY = Sampling(max_tokens=10)


def adapter_of(base, **provenance):
    new_layers(base.model, LoraConfig(rank=2), 0)
    randomized(base.model)
    adapter = collect(base.model, LoraConfig(rank=2), provenance)
    detach(base.model)
    return adapter


def said(conversation, text) -> str:
    return "".join(conversation.say(text))


def test_the_cache_is_reused_and_answers_are_those_of_a_fresh_prompt(dense):
    chat = Conversation(dense, {}, GREEDY)
    chat.system = "be brief"
    messages = [{"role": "system", "content": "be brief"}]
    for turn, text in enumerate(("hello", "and then?", "why?")):
        messages.append({"role": "user", "content": text})
        expected = answer(dense.model, dense.tokenizer, chat_tokens(dense.tokenizer, messages), 10)
        assert said(chat, text) == expected
        messages.append({"role": "assistant", "content": expected})
        assert (chat.reused > 20) == (turn > 0)


def test_reset_and_system_start_over(dense):
    chat = Conversation(dense, {}, GREEDY)
    first = said(chat, "hello")
    said(chat, "more")
    chat.reset()
    assert said(chat, "hello") == first


def test_switching_the_adapter_forgets_the_cache_not_the_conversation(dense):
    adapter = adapter_of(dense)
    chat = Conversation(dense, {}, GREEDY)
    bare = said(chat, "hello")
    chat.add("tuned", adapter)
    chat.reset()
    tuned = said(chat, "hello")
    assert tuned != bare
    chat.use(None)
    assert len(chat.history) == 2
    chat.reset()
    assert said(chat, "hello") == bare


def test_an_adapter_trained_on_plain_text_continues_plain_text(dense):
    assert Conversation(dense, {"a": adapter_of(dense, data={"format": "text"})}, GREEDY).raw
    assert not Conversation(dense, {"a": adapter_of(dense, data={"format": "chat"})}, GREEDY).raw
    assert Conversation(dense, {}, GREEDY, raw=True).raw


def test_an_answer_cut_off_joins_the_history(dense):
    chat = Conversation(dense, {}, GREEDY)
    pieces = chat.say("hello")
    heard = next(pieces)
    pieces.close()
    assert chat.history[-1] == {"role": "assistant", "content": heard}
    assert said(chat, "go on") is not None


def test_sampling_is_seeded(dense):
    hot = Sampling(max_tokens=10, temperature=2.0, seed=4)
    assert said(Conversation(dense, {}, hot), "x") == said(Conversation(dense, {}, hot), "x")


def test_an_adapter_that_does_not_fit_leaves_the_one_in_use(dense, experts):
    good, bad = adapter_of(dense), adapter_of(experts)
    chat = Conversation(dense, {"good": good}, GREEDY)
    tuned = said(chat, "hello")
    with pytest.raises(AdapterError):
        chat.add("bad", bad)
    chat.reset()
    assert chat.adapter is good
    assert said(chat, "hello") == tuned


def test_an_answer_broken_off_inside_the_model_spoils_no_later_one(dense, monkeypatch):
    chat = Conversation(dense, {}, GREEDY)
    said(chat, "hello")
    last = type(dense.model.layers[-1])
    with monkeypatch.context() as patch:
        patch.setattr(last, "__call__", _interrupted_at(dense.model.layers[-1], last.__call__))
        with pytest.raises(KeyboardInterrupt):
            said(chat, "more")
    chat.history = chat.history[:2]
    expected = said(Conversation(dense, {}, GREEDY), "hello")
    assert chat.history[1]["content"] == expected
    assert said(chat, "again") == _fresh(dense, chat.history[:2], "again")


def _interrupted_at(block, call):
    def interrupted(self, *arguments, **options):
        if self is block:
            raise KeyboardInterrupt
        return call(self, *arguments, **options)

    return interrupted


def _fresh(base, history, text) -> str:
    tokens = chat_tokens(base.tokenizer, [*history, {"role": "user", "content": text}])
    return answer(base.model, base.tokenizer, tokens, 10)
