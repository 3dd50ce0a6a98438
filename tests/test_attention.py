import memory
import mlx.core as mx
import numpy as np
import pytest

from mlxlora.train import attention as lean
from mlxlora.train.attention import Spans, attention, tiles

SCALE = 0.3


def tensors(length, heads=6, kv_heads=2, size=16, value_size=16, rows=2):
    mx.random.seed(0)
    shapes = [(rows, heads, length, size), (rows, kv_heads, length, size)]
    shapes += [(rows, kv_heads, length, value_size), (rows, heads, length, value_size)]
    return [mx.random.normal(shape) for shape in shapes]


def seen(ends, window=None) -> np.ndarray:
    """Which position sees which, position by position."""
    begin, mask = 0, np.zeros((ends[-1], ends[-1]), bool)
    for end in ends:
        for query in range(begin, end):
            first = begin if window is None else max(begin, query - window + 1)
            mask[query, first : query + 1] = True
        begin = end
    return mask


def gradients(function, arrays, cotangent):
    def loss(*arrays):
        return (function(*arrays) * cotangent).sum()

    output = function(*arrays)
    return [output, *mx.grad(loss, argnums=tuple(range(len(arrays))))(*arrays)]


CASES = {
    "one row": ((70,), None),
    "shorter than a tile": ((9,), None),
    "packed rows": ((5, 6, 40, 41, 70), None),
    "a window": ((70,), 9),
    "packed rows and a window": ((30, 70), 9),
    "a window longer than a tile": ((150,), 80),
}


@pytest.mark.parametrize("step", [32, 64])
@pytest.mark.parametrize("case", list(CASES))
def test_output_and_gradients_are_those_of_mlx(monkeypatch, case, step):
    monkeypatch.setattr(lean, "tile_queries", lambda: step)
    ends, window = CASES[case]
    *arrays, cotangent = tensors(ends[-1])
    mask = mx.array(seen(ends, window))
    reference = gradients(
        lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask=mask),
        arrays,
        cotangent,
    )
    ids = np.searchsorted(ends, np.arange(ends[-1]), side="right").astype(np.int32)
    segments = mx.array(np.stack([ids, ids]))
    longest = int(np.diff((0, *ends)).max())
    told = Spans(ends, window)
    found = Spans((ends[-1],), window, segments, reach=longest)
    for spans in (told, found):
        ours = gradients(lambda q, k, v, s=spans: attention(q, k, v, SCALE, s), arrays, cotangent)
        for wanted, array in zip(reference, ours, strict=True):
            np.testing.assert_allclose(array, wanted, atol=2e-5)
        assert np.array_equal(np.broadcast_to(spans.mask(), (2, 1, *mask.shape))[0, 0], mask)


def test_sinks_take_weight_and_their_gradient_is_that_of_one_more_key(monkeypatch):
    monkeypatch.setattr(lean, "tile_queries", lambda: 32)
    *arrays, cotangent = tensors(50)
    sinks = mx.random.normal((6,))
    mask = mx.array(seen((20, 50)))

    def with_one_more_key(q, k, v, sinks):
        k, v = (mx.repeat(a, 3, axis=1) for a in (k, v))
        scores = mx.where(mask, SCALE * q @ k.swapaxes(-1, -2), -mx.inf)
        extra = mx.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        return mx.softmax(mx.concatenate([scores, extra], axis=-1), axis=-1)[..., :-1] @ v

    wanted = gradients(with_one_more_key, [*arrays, sinks], cotangent)
    spans = Spans((20, 50))
    ours = gradients(
        lambda q, k, v, s: attention(q, k, v, SCALE, spans, s), [*arrays, sinks], cotangent
    )
    for reference, array in zip(wanted, ours, strict=True):
        np.testing.assert_allclose(array, reference, atol=2e-5)


def test_values_may_be_of_another_size_and_half_precision():
    *arrays, cotangent = tensors(40, value_size=24)
    arrays = [a.astype(mx.bfloat16) for a in arrays]
    q, k, v = (a.astype(mx.float32) for a in arrays)
    wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal")
    ours = gradients(lambda q, k, v: attention(q, k, v, SCALE, Spans((40,))), arrays, cotangent)
    assert [a.dtype for a in ours] == [mx.bfloat16] * 4
    np.testing.assert_allclose(ours[0].astype(mx.float32), wanted, atol=0.03)


def test_tiles_cover_every_query_once_and_every_key_it_sees():
    for ends, window, reach in (((10, 100), None, None), ((100,), 7, None), ((100,), 40, 20)):
        found = tiles(Spans(ends, window, reach=reach), 32)
        queries = [n for tile in found for n in range(tile.start, tile.stop)]
        assert queries == list(range(100))
        mask = seen(ends, min((n for n in (window, reach) if n), default=None))
        for tile in found:
            part = mask[tile.start : tile.stop]
            assert not part[:, : tile.first].any() and not part[:, tile.stop :].any()


def test_scores_of_one_tile_exist_at_a_time():
    *arrays, cotangent = tensors(2048, heads=4, kv_heads=2, rows=1)
    mx.eval(arrays, cotangent)

    def peak(function):
        return memory.peak(lambda: mx.eval(gradients(function, arrays, cotangent)[1:]))

    whole = peak(
        lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal")
    )
    ours = peak(lambda q, k, v: attention(q, k, v, SCALE, Spans((2048,))))
    assert ours < 0.2 * whole
