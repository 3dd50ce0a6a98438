import numpy as np
import pytest
from test_batches import example

from mlxlora.data.layout import MAX_SHAPES, choose_layout

random = np.random.default_rng(1)
LENGTHS = np.clip(random.lognormal(5, 0.7, 3000).astype(int), 3, 2048).tolist()
SIZES = [(n, max(1, n // 2)) for n in LENGTHS]


def rows(count: int, seed: int):
    chosen = np.random.default_rng(seed).choice(len(SIZES), count)
    return [example(SIZES[i][0] + 1, start=SIZES[i][0] + 1 - SIZES[i][1]) for i in chosen]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("batch_size", "tokens"), [(8, 2048), (1, 2048), (32, 4096), (3, 10)])
def test_every_supervised_token_of_every_row_is_in_one_micro_batch(
    packed, exact, batch_size, tokens
):
    layout = choose_layout(SIZES, 2048, batch_size, tokens, packed=packed, exact=exact)
    assert len(layout.shapes) <= MAX_SHAPES
    for trial in range(20):
        examples = rows(batch_size, trial)
        batches = layout.cut(examples)
        wanted = sorted(np.concatenate([e.tokens[1:][e.mask[1:]] for e in examples]).tolist())
        trained = [b.targets[b.weights > 0] for b in batches]
        assert sorted(np.concatenate(trained).tolist()) == wanted
        for batch in batches:  # the token at a position is the one before its target
            own = batch.weights > 0
            before = batch.inputs.reshape(-1)[batch.positions[own]]
            assert np.array_equal(before + 1, batch.targets[own])
            assert exact or batch.shape in layout.shapes
            if exact and batch.inputs.size > tokens:  # then one row alone is that long
                assert len(batch.ends) == 1 and batch.inputs.shape[0] == 1


@pytest.mark.parametrize(
    ("packed", "exact", "most"), [(True, True, 1.0), (True, False, 1.12), (False, True, 1.25)]
)
def test_little_is_padding(packed, exact, most):
    layout = choose_layout(SIZES, 2048, 32, 4096, packed=packed, exact=exact)
    updates = [rows(32, seed) for seed in range(50)]
    places = sum(b.inputs.size for update in updates for b in layout.cut(update))
    assert places / sum(e.size[0] for update in updates for e in update) <= most


def test_leftover_slots_are_few():
    layout = choose_layout(SIZES, 2048, 32, 4096, packed=True, exact=False)
    updates = [rows(32, seed) for seed in range(50)]
    slots = sum(len(b.positions) for update in updates for b in layout.cut(update))
    assert slots / sum(e.supervised for update in updates for e in update) < 1.25


def test_packed_micro_batches_of_an_update_are_of_like_size():
    layout = choose_layout(SIZES, 2048, 64, 2048, packed=True, exact=True)
    for seed in range(10):
        sizes = [batch.inputs.size for batch in layout.cut(rows(64, seed))]
        assert max(sizes) <= 2048
        assert sum(sorted(sizes)[-2:]) > 2048  # fewer would not have held them


def test_rows_of_one_length_share_one_shape():
    layout = choose_layout([(100, 100)] * 50, 100, 4, 400, packed=False, exact=False)
    assert layout.shapes[-1][:2] == (3, 128)  # 4 x 128 tokens would be more than 400
    layout = choose_layout([(96, 10)] * 50, 96, 4, 400, packed=True, exact=False)
    assert {shape[1] for shape in layout.shapes} == {384, 416}
    assert layout.cut([example(97, start=87)] * 4)[0].shape == (1, 384, 64)


def test_examples_without_a_supervised_token_are_left_out():
    layout = choose_layout([(5, 5)], 5, 4, 64, packed=True, exact=True)
    assert layout.cut([example(6, start=6)]) == []
    assert layout.cut([]) == []
    assert [b.ends for b in layout.cut([example(6, start=6), example(4)])] == [(3,)]
