"""The engine: mixed answers against each adapter alone, and what goes wrong staying small."""

import itertools
import threading

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator
from serving import Told, adapter_for, ask

from mlxlora.errors import AdapterError, DataError, ModelError
from mlxlora.generate import stream
from mlxlora.lora.attach import attach, detach
from mlxlora.serve import engine as engine_module
from mlxlora.serve.batch import room as room_module
from mlxlora.serve.batch.answer import Answer
from mlxlora.serve.engine import Engine, Options
from mlxlora.serve.grammar.texts import json_grammar
from mlxlora.serve.orders import Busy, End, Fault, Order, Sampling, Unknown

PROMPTS = [list(range(5 + i, 25 + 3 * i)) for i in range(14)]


def expected(base, adapter, prompt, count=16):
    """mlx-lm's own greedy answer with this adapter attached alone."""
    if adapter is not None:
        attach(base.model, adapter)
    tokens = [r.token for r in stream(base.model, base.tokenizer, prompt, count)]
    detach(base.model)
    return tokens


@pytest.fixture
def trained(dense):
    return {
        "one": adapter_for(dense, 1),
        "wide": adapter_for(dense, 2, rank=9),
        "few": adapter_for(dense, 3, targets=("*.q_proj", "*.down_proj")),
    }


def test_staggered_requests_answer_as_each_adapter_does_alone(dense, trained):
    names = list(itertools.islice(itertools.cycle([None, *trained]), len(PROMPTS)))
    wanted = [expected(dense, trained.get(n), p) for n, p in zip(names, PROMPTS, strict=True)]
    with Engine(dense, trained, Options(rows=5)) as engine:
        told = [ask(engine, p, n) for n, p in zip(names, PROMPTS, strict=True)]
        assert [one.tokens for one in told] == wanted
        assert engine.health()["restarts"] == 0
    assert not any("RowsLinear" in type(m).__name__ for m in dense.model.modules())


def test_removing_one_in_mid_run_changes_no_other(dense, trained):
    wanted = expected(dense, trained["one"], PROMPTS[0], 40)
    with Engine(dense, trained) as engine:
        told = ask(engine, PROMPTS[0], "one", max_tokens=40)
        other = Told()
        ticket = engine.submit(Order(tuple(PROMPTS[1]), "wide", 400), other)
        other.next()
        ticket.cancel()
        assert other.wait().reason == "cancelled"
        assert told.tokens == wanted
        ticket.cancel()  # again, of one that is done
        assert ask(engine, PROMPTS[2], "few").wait().reason == "length"


@pytest.mark.parametrize(
    "config", [{"method": "dora"}, {"targets": ("all-linear", "*embed_tokens")}]
)
def test_what_cannot_be_mixed_has_a_batch_of_its_own(dense, trained, config):
    apart = adapter_for(dense, 8, **config)
    everyone = {**trained, "apart": apart}
    names = list(itertools.islice(itertools.cycle([None, *everyone]), len(PROMPTS)))
    wanted = [expected(dense, everyone.get(n), p) for n, p in zip(names, PROMPTS, strict=True)]
    with Engine(dense, everyone) as engine:
        assert engine.names["apart"].form is not None
        told = [ask(engine, p, n) for n, p in zip(names, PROMPTS, strict=True)]
        assert [one.tokens for one in told] == wanted


def test_experts_have_a_batch_of_their_own(experts):
    adapter = adapter_for(experts, 1)
    wanted = expected(experts, adapter, PROMPTS[0])
    with Engine(experts, {"one": adapter}) as engine:
        base = ask(engine, PROMPTS[0])
        assert ask(engine, PROMPTS[0], "one").tokens == wanted
        assert base.tokens == expected_later(experts, PROMPTS[0], engine)


def expected_later(base, prompt, engine):
    """The bare base's answer, once the engine has put everything back."""
    engine.stop()
    return expected(base, None, prompt)


def test_adapters_come_and_go_while_others_are_served(dense, trained):
    wanted = expected(dense, trained["one"], PROMPTS[0], 200)
    late = expected(dense, trained["wide"], PROMPTS[1])
    with Engine(dense, {"one": trained["one"]}, Options(slots=2)) as engine:
        told = ask(engine, PROMPTS[0], "one", max_tokens=200)
        told.next()
        engine.load("late", trained["wide"])
        assert ask(engine, PROMPTS[1], "late").tokens == late
        engine.unload("one")  # in use: it is completed
        with pytest.raises(Unknown):
            ask(engine, PROMPTS[0], "one")
        assert told.tokens == wanted
        engine.load("one", trained["few"])  # in the slot that is free again
        assert ask(engine, PROMPTS[1], "late").tokens == late
        with pytest.raises(AdapterError, match="slots"):
            engine.load("third", trained["one"])
        with pytest.raises(AdapterError, match="loaded already"):
            engine.load("late", trained["one"])
        with pytest.raises(Unknown):
            engine.unload("nobody")


@pytest.mark.parametrize("again", [False, True])
def test_an_adapter_unloaded_while_it_is_asked_for_is_not_answered_for(
    dense, trained, monkeypatch, again
):
    with Engine(dense, {"one": trained["one"]}, Options(slots=1)) as engine:
        whole = engine.grammars.grammar

        def meanwhile(grammar, prompt_tokens):
            engine.unload("one")
            if again:  # in the slot that is free now
                engine.load("other", trained["wide"])
            return whole(grammar, prompt_tokens)

        monkeypatch.setattr(engine.grammars, "grammar", meanwhile)
        last = ask(engine, PROMPTS[0], "one", grammar="any").wait()
        assert isinstance(last, Fault)
        assert not last.ours
        assert "unloaded" in last.message
        assert engine.health()["waiting"] == 0


@pytest.mark.parametrize("ends", ["cancelled", "together"])
def test_a_fault_while_one_ends_leaves_nobody_waiting(dense, monkeypatch, ends):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with Engine(dense) as engine:
        told = [Told(), Told(), Told()]
        tickets = [engine.submit(Order((1, 2, 3, 4), max_tokens=400), one) for one in told]
        for one in told:
            one.next()
        if ends == "cancelled":
            monkeypatch.setattr(BatchGenerator, "remove", broken)
            tickets[0].cancel()
        else:
            monkeypatch.setattr(Answer, "token", broken)
        last = [one.wait() for one in told]
        assert sum(isinstance(one, Fault) for one in last) == (2 if ends == "cancelled" else 3)
        monkeypatch.undo()
        assert isinstance(ask(engine, PROMPTS[0]).wait(), End)
        health = engine.health()
        assert (health["running"], health["waiting"], health["restarts"]) == (0, 0, 1)


def test_a_prompt_that_goes_on_where_another_ended_is_computed_from_there(dense, trained):
    with Engine(dense, trained) as engine:
        first = ask(engine, PROMPTS[3], "one")
        longer = [*PROMPTS[3], *first.tokens, 7, 8, 9]
        again = ask(engine, longer, "one")
        cached = again.wait().cached_tokens
        assert cached == len(PROMPTS[3]) + len(first.tokens)
        # the same prompt, and one that is exactly what is kept: never an empty rest
        assert ask(engine, PROMPTS[3], "one").tokens == first.tokens
        exact = longer[: cached + 1]
        assert ask(engine, exact, "one").wait().cached_tokens == cached
        assert ask(engine, longer, "wide").wait().cached_tokens == 0
        answer = again.tokens
    assert answer == expected(dense, trained["one"], longer)


def test_a_stop_ends_the_answer_and_a_finished_grammar_does(dense):
    with Engine(dense) as engine:
        whole = ask(engine, PROMPTS[0], max_tokens=40).text
        stop = whole[5:7]
        told = ask(engine, PROMPTS[0], max_tokens=40, stops=(stop,))
        assert told.wait().reason == "stop"
        assert told.text == whole[: whole.find(stop)]
        schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
        held = json_grammar({**schema, "additionalProperties": False})
        told = ask(engine, PROMPTS[0], grammar=held, sampling=Sampling(1.0, seed=3), max_tokens=90)
        assert told.wait().reason == "stop"
        assert "".join(told.text.split()) in ('{"a":"x"}', '{"a":"y"}')
        wrong = ask(engine, PROMPTS[0], grammar="{").wait()
        assert not wrong.ours and "cannot be followed" in wrong.message
        assert engine.health()["running"] + engine.health()["waiting"] == 0


def test_log_probabilities_are_those_of_the_model(dense):
    with Engine(dense) as engine:
        told = ask(engine, PROMPTS[0], top=3, max_tokens=4)
        told.wait()
    spelled = [one for piece in told.pieces for one in piece.tokens]
    logits = dense.model(mx.array([[*PROMPTS[0], *told.tokens]]))[0]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for place, one in enumerate(spelled, len(PROMPTS[0]) - 1):
        row = logprobs[place]
        best = mx.argsort(-row)[:3].tolist()
        assert [token for token, _ in one.top] == best
        assert one.logprob == pytest.approx(row[one.token].item(), abs=1e-4)
        assert one.top[0][1] == pytest.approx(row[best[0]].item(), abs=1e-4)


def test_too_many_are_refused_and_say_when_to_come_again(dense):
    with Engine(dense, options=Options(rows=1, waiting=1)) as engine:
        held, queued = Told(), Told()
        ticket = engine.submit(Order(tuple(PROMPTS[0]), None, 400), held)
        waiting = engine.submit(Order(tuple(PROMPTS[1]), None, 400), queued)
        with pytest.raises(Busy) as refused:
            ask(engine, PROMPTS[2])
        assert refused.value.seconds >= 1
        waiting.cancel()  # while it waits
        assert queued.wait() == End("cancelled", len(PROMPTS[1]), 0, 0)
        ticket.cancel()
        held.wait()
        assert ask(engine, PROMPTS[2]).wait().reason == "length"
    assert engine.vitals.counters.refused == 1
    assert engine.vitals.counters.cancelled == 2


def test_a_prompt_must_have_tokens_and_fit(dense):
    with Engine(dense, options=Options(context=64)) as engine:
        for prompt in ([], list(range(64)), list(range(200))):
            with pytest.raises(DataError, match="1 to 63 tokens"):
                ask(engine, prompt)
        assert ask(engine, list(range(60)), max_tokens=99).wait().tokens == 4


def test_a_fault_of_one_request_is_that_request_s(dense, monkeypatch):
    def broken(sampling):
        def processor(tokens, logits):
            if sampling.presence == 1.5:
                raise ValueError("no such thing")
            return logits

        return [processor]

    monkeypatch.setattr("mlxlora.serve.batch.answer.processors", broken)
    wanted = expected(dense, None, PROMPTS[0])
    with Engine(dense) as engine:
        good = ask(engine, PROMPTS[0])
        bad = ask(engine, PROMPTS[1], sampling=Sampling(presence=1.5))
        assert "no such thing" in bad.wait().message and bad.last.ours
        assert good.tokens == wanted
        assert engine.health()["status"] == "ok"
        assert engine.health()["restarts"] == 0


def test_a_fault_of_the_engine_ends_those_in_flight_and_it_begins_anew(dense, trained, monkeypatch):
    wanted = expected(dense, trained["one"], PROMPTS[0])
    failing = threading.Event()
    whole = engine_module.Lane.step

    def step(lane):
        if failing.is_set():
            raise RuntimeError("[metal] out of luck")
        return whole(lane)

    monkeypatch.setattr(engine_module.Lane, "step", step)
    with Engine(dense, trained) as engine:
        told = [
            ask(engine, p, n, max_tokens=300) for p, n in zip(PROMPTS, ("one", None), strict=False)
        ]
        told[0].next()
        failing.set()
        for one in told:
            last = one.wait()
            assert isinstance(last, Fault) and last.ours and "begun anew" in last.message
        health = engine.health()
        assert health["status"] == "faulty"
        assert health["restarts"] >= 1 and "out of luck" in health["last_fault"]
        failing.clear()
        assert ask(engine, PROMPTS[0], "one").tokens == wanted
        assert engine.health()["status"] == "ok"
        assert engine.health()["restarts"] >= 1


def test_one_who_cannot_be_told_harms_nobody(dense):
    def deaf(event):
        raise RuntimeError("gone")

    with Engine(dense) as engine:
        engine.submit(Order(tuple(PROMPTS[0]), None, 20), deaf)
        engine._inbox.put(lambda: 1 / 0)
        assert ask(engine, PROMPTS[1]).wait().reason == "length"
        assert engine.health()["status"] == "ok"


def test_of_an_engine_that_stopped_nothing_is_waited_for(dense, trained):
    with Engine(dense) as engine:
        pass
    with pytest.raises(Busy, match="shutting down"):
        engine.load("one", trained["one"])
    with pytest.raises(Busy, match="shutting down"):
        ask(engine, PROMPTS[0])


def test_stopping_ends_what_is_in_flight_honestly(dense):
    engine = Engine(dense)
    engine.start()
    told = ask(engine, PROMPTS[0], max_tokens=400)
    told.next()
    engine.stop()
    assert isinstance(told.wait(), Fault) and "shutting down" in told.last.message
    assert engine.health()["status"] == "stopped"
    with pytest.raises(Busy):
        ask(engine, PROMPTS[0])


def test_an_answer_depends_on_its_seed_not_on_its_company(dense, trained):
    warm = Sampling(temperature=1.0, seed=11)
    with Engine(dense, trained) as engine:
        alone = ask(engine, PROMPTS[0], "one", sampling=warm).tokens
        company = [
            ask(engine, p, n, sampling=Sampling(1.0, top_p=0.9, seed=i))
            for i, (p, n) in enumerate(
                zip(PROMPTS, itertools.cycle(["wide", None, "few"]), strict=False)
            )
        ]
        again = ask(engine, PROMPTS[0], "one", sampling=warm)
        other = ask(engine, PROMPTS[0], "one", sampling=Sampling(1.0, seed=12))
        assert again.tokens == alone != other.tokens
        for one in company:
            one.wait()


def test_memory_for_keys_and_values_limits_how_many_run(dense, monkeypatch):
    monkeypatch.setattr(room_module, "memory_budget", lambda: 0)
    monkeypatch.setattr(room_module, "LEAST_KEYS", 100 * 2 * 2 * 32 * 4)  # 100 tokens' worth
    most = 0

    def seen(event):
        nonlocal most
        most = max(most, engine.health()["running"])
        told(event)

    with Engine(dense, options=Options(prefixes=0)) as engine:
        assert engine.room.context == 100
        told = Told()
        for prompt in PROMPTS[:4]:
            engine.submit(Order(tuple(prompt), None, 20), seen)
        for _ in range(4):
            told.last = None
            told.wait()
    assert most == 2


def test_a_family_that_cannot_be_batched_is_refused_by_name(dense, monkeypatch):
    from mlx_lm.models.cache import ChunkedKVCache

    monkeypatch.setattr(room_module, "make_prompt_cache", lambda model: [ChunkedKVCache(8)])
    with pytest.raises(ModelError, match="ChunkedKVCache"):
        Engine(dense)


def test_the_pieces_together_are_the_tokens_decoded(dense):
    with Engine(dense) as engine:
        told = ask(engine, PROMPTS[0], max_tokens=60, sampling=Sampling(1.5, seed=1))
        assert told.text == dense.tokenizer.decode(told.tokens)


def test_a_fault_is_its_state_until_it_has_worked_again(dense):
    with Engine(dense) as engine:
        engine.vitals.fault(RuntimeError("out of luck"))
        assert engine.health()["status"] == "faulty"
        ask(engine, PROMPTS[0], max_tokens=2).wait()
        ask(engine, PROMPTS[0], max_tokens=2).wait()  # begun after the first one's last step
        assert engine.health()["status"] == "ok"
        assert engine.health()["last_fault"] == "RuntimeError: out of luck"
