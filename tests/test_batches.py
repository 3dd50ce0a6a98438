import numpy as np
import pytest
from conftest import write_rows
from mlx_lm import utils as zoo

from mlxlora.config import DataConfig
from mlxlora.data.batches import (
    MAX_SHAPES,
    Cursor,
    Feed,
    choose_shapes,
    collate,
    cut,
    permutation,
    sample_lengths,
)
from mlxlora.data.records import open_splits
from mlxlora.data.render import Example, Renderer
from mlxlora.errors import DataError


def example(length: int, row: int = 0, start: int = 0) -> Example:
    mask = np.ones(length, bool)
    mask[:start] = False
    return Example(row, np.arange(1, length + 1, dtype=np.int32), mask)


def feed(tmp_path, dense_path, rows, batch_size=4, **data) -> Feed:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = DataConfig(path=str(path), valid_fraction=0, **data)
    renderer = Renderer(zoo.load_tokenizer(dense_path), config)
    splits = open_splits(config, 0)
    lengths, _ = sample_lengths(splits.train, renderer, False)
    shapes = choose_shapes(lengths, max(lengths), batch_size, 256)
    return Feed(splits.train, renderer, batch_size, shapes, seed=5)


def test_every_row_appears_exactly_once_an_epoch_in_another_order_each(tmp_path, dense_path):
    source = feed(tmp_path, dense_path, [{"text": "x" * (i % 7 + 1)} for i in range(30)])
    assert source.updates_per_epoch == 8
    updates = source.updates(Cursor())
    epochs = [[row for _ in range(8) for row in next(updates).rows] for _ in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_cursor_says_exactly_where_the_run_stands(tmp_path, dense_path):
    source = feed(tmp_path, dense_path, [{"text": "x" * (i % 7 + 1)} for i in range(30)])
    stream = source.updates(Cursor())
    run = [next(stream) for _ in range(20)]
    for stop in (3, 7, 8, 15):
        again = source.updates(run[stop - 1].cursor)
        assert [next(again).rows for _ in range(4)] == [u.rows for u in run[stop : stop + 4]]


def test_rows_that_train_nothing_are_dropped_and_counted(tmp_path, dense_path):
    rows = [{"prompt": "x" * (200 if i % 3 == 0 else 5), "completion": "yes"} for i in range(12)]
    source = feed(tmp_path, dense_path, rows, max_length=100)
    stream = source.updates(Cursor())
    updates = [next(stream) for _ in range(6)]
    assert sum(len(update.rows) for update in updates) == 16
    assert (source.tally.rows, source.tally.dropped, source.tally.truncated) == (12, 4, 4)


def test_rows_that_all_train_nothing_are_an_error_before_training(tmp_path, dense_path):
    with pytest.raises(DataError, match=r"none of the 3 rows looked at .*max_length = 10"):
        feed(tmp_path, dense_path, [{"prompt": "x" * 50, "completion": "y"}] * 3, max_length=10)


def test_shapes_are_few_and_hold_every_row():
    random = np.random.default_rng(1)
    lengths = np.clip(random.lognormal(5, 0.8, 3000).astype(int), 3, 2048).tolist()
    for batch_size, budget in ((8, 2048), (1, 2048), (64, 8192), (3, 10)):
        shapes = choose_shapes(lengths, 2048, batch_size, budget)
        assert len(shapes) <= MAX_SHAPES
        assert max(length for _, length in shapes) >= 2048
        for trial in range(20):
            chosen = random.choice(lengths, batch_size)
            examples = [example(n + 1, row=trial) for n in chosen]
            batches = list(cut(examples, shapes))
            assert {batch.shape for batch in batches} <= set(shapes)
            assert sum(batch.tokens for batch in batches) == int(chosen.sum())


def test_sorting_by_length_wastes_little():
    random = np.random.default_rng(2)
    lengths = np.clip(random.lognormal(5, 0.6, 3000).astype(int), 3, 2048).tolist()
    shapes = choose_shapes(lengths, 2048, 32, 4096)
    padded = useful = 0
    for _ in range(50):
        chosen = random.choice(lengths, 32)
        for batch in cut([example(n + 1) for n in chosen], shapes):
            padded += batch.mask.size
        useful += int(chosen.sum())
    assert padded / useful < 1.2


def test_collate_shifts_targets_and_masks_padding():
    batch = collate([example(4, start=2), example(3)], (3, 5))
    assert batch.inputs.tolist() == [[1, 2, 3, 0, 0], [1, 2, 0, 0, 0], [0] * 5]
    assert batch.targets.tolist() == [[2, 3, 4, 0, 0], [2, 3, 0, 0, 0], [0] * 5]
    assert batch.mask.astype(int).tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0] * 5]


def test_order_is_a_function_of_seed_and_epoch():
    assert np.array_equal(permutation(100, 1, 2), permutation(100, 1, 2))
    assert not np.array_equal(permutation(100, 1, 2), permutation(100, 1, 3))
    assert not np.array_equal(permutation(100, 1, 2), permutation(100, 2, 2))
