"""What is kept of prompts: found by their beginning and adapter, within a limit of bytes."""

import mlx.core as mx
import pytest
from conftest import worst
from memory import held
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from mlxlora.serve.batch.prefixes import Prefixes

TOKENS = list(range(40))


def filled(count, kind=KVCache, *options):
    cache = kind(*options)
    cache.update_and_fetch(mx.ones((1, 1, count, 4)), mx.ones((1, 1, count, 4)))
    return cache


def test_the_longest_common_beginning_is_found_and_the_rest_cut_off():
    prefixes = Prefixes(1 << 20)
    prefixes.keep("a", TOKENS, [filled(40)])
    prefixes.keep("a", [*TOKENS[:20], 99, 98], [filled(22)])
    caches, length = prefixes.find("a", [*TOKENS[:30], 77, 78])
    assert length == 30 and caches[0].offset == 30
    assert prefixes.find("b", TOKENS) == (None, 0)
    assert prefixes.find("a", [5, *TOKENS]) == (None, 0)


@pytest.mark.parametrize("count", [1, 39, 40])
def test_at_least_one_token_is_left_to_compute(count):
    prefixes = Prefixes(1 << 20)
    prefixes.keep("a", TOKENS, [filled(40)])
    _, length = prefixes.find("a", TOKENS[:count])
    assert length == (count - 1 if count > 16 else 0)


def test_what_is_found_is_written_to_without_changing_what_is_kept(dense):
    model, tokens = dense.model, mx.arange(30)[None]
    caches = make_prompt_cache(model)
    model(tokens, cache=caches)
    prefixes = Prefixes(1 << 20)
    prefixes.keep("a", tokens[0].tolist(), caches)
    prompt = [*range(20), 200, 201]
    expected = model(mx.array([prompt]))[0, -1]
    for _ in range(2):
        found, length = prefixes.find("a", prompt)
        assert length == 20
        assert worst(model(mx.array([prompt[20:]]), cache=found)[0, -1], expected) < 1e-5


def test_a_cache_that_cannot_be_cut_serves_only_what_goes_on_from_its_end():
    prefixes = Prefixes(1 << 20)
    state = ArraysCache(1)
    state[0] = mx.ones((1, 4))
    prefixes.keep("a", TOKENS, [CacheList(filled(40)), state])
    assert prefixes.find("a", [*TOKENS[:30], 7]) == (None, 0)
    caches, length = prefixes.find("a", [*TOKENS, 7])
    assert length == 40
    caches[1][0] = mx.zeros((1, 4))
    again, _ = prefixes.find("a", [*TOKENS, 8])
    assert again[1][0].sum().item() == 4
    full = Prefixes(1 << 20)
    full.keep("a", TOKENS, [filled(40, RotatingKVCache, 16)])
    assert full.find("a", [*TOKENS[:30], 7]) == (None, 0)


def test_a_longer_one_takes_the_place_of_its_beginning():
    prefixes = Prefixes(1 << 20)
    prefixes.keep("a", TOKENS[:30], [filled(30)])
    prefixes.keep("a", TOKENS, [filled(40)])
    assert len(prefixes) == 1
    prefixes.keep("b", TOKENS, [filled(40)])
    prefixes.forget("a")
    assert len(prefixes) == 1 and prefixes.size == filled(40).nbytes
    prefixes.forget()
    assert prefixes.size == 0


def test_bytes_are_limited_and_the_longest_unused_goes_first():
    each = filled(20).nbytes
    prefixes = Prefixes(2 * each)
    for key in "abc":
        if key == "c":
            prefixes.find("a", [*range(20), 1])
        prefixes.keep(key, list(range(20)), [filled(20)])
        assert prefixes.size <= 2 * each
    assert [prefixes.find(key, list(range(20)))[1] for key in "abc"] == [19, 0, 19]
    prefixes.keep("d", list(range(2000)), [filled(2000)])
    assert prefixes.find("d", list(range(2000))) == (None, 0)
    nothing = Prefixes(0)
    nothing.keep("a", TOKENS, [filled(40)])
    assert len(nothing) == 0


def test_a_recurrent_state_is_kept_without_the_batch_that_it_was_cut_from():
    def batch():
        cache = ArraysCache(2)  # the second is never filled, as in some models
        cache[0] = mx.arange(16 * 1024, dtype=mx.float32).reshape(16, 1024)
        mx.eval(cache.state)
        return cache

    def cut():
        cache = ArraysCache(2)
        cache[0] = batch()[0][3:4]
        return cache

    before = held()
    prefixes = Prefixes(1 << 20)
    prefixes.keep("a", TOKENS, [CacheList(cut(), filled(40))])
    assert held() - before <= 2 * prefixes.size < 16 * 4096
    (found,), _ = prefixes.find("a", [*TOKENS, 9])
    assert found.caches[0][0][0, 0].item() == 3 * 1024
