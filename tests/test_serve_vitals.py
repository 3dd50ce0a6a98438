"""What an engine tells of itself."""

from mlxlora.serve import vitals
from mlxlora.serve.vitals import Vitals


def test_a_fault_is_told_for_a_while_and_not_for_ever(monkeypatch):
    seen = Vitals()
    assert not seen.faulty and seen.last_fault == ""
    seen.fault(RuntimeError("out of luck"))
    assert seen.faulty and seen.last_fault == "RuntimeError: out of luck"
    assert seen.counters.restarts == 1
    monkeypatch.setattr(vitals, "FAULT_SECONDS", 0.0)
    assert not seen.faulty and seen.last_fault


def test_an_engine_that_works_again_is_not_faulty():
    seen = Vitals()
    seen.fault(RuntimeError())
    seen.works()
    assert not seen.faulty and seen.counters.restarts == 1


def test_a_fault_is_told_in_few_words():
    seen = Vitals()
    seen.fault(ValueError("x" * 10_000))
    assert len(seen.last_fault) == 400


def test_what_is_told_to_wait_follows_what_answers_took():
    seen = Vitals()
    assert seen.wait(0) == 1 and seen.wait(3) == 3
    for _ in range(200):
        seen.took(5.0)
    assert seen.wait(2) == 10 and seen.wait(1000) == 60


def test_counters_add_up():
    seen = Vitals()
    seen.answered(10, 4, 3)
    seen.answered(5, 0, 2)
    counted = seen.counters
    assert (counted.answers, counted.prompt_tokens, counted.cached_tokens) == (2, 15, 4)
    assert counted.tokens == 5
