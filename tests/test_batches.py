import numpy as np
import pytest
from conftest import write_rows
from mlx_lm import utils as zoo

from mlxlora.config import DataConfig
from mlxlora.data.batches import Cursor, Feed, Tally, pack, pad, permutation, sample_sizes
from mlxlora.data.layout import choose_layout
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
    sizes, _ = sample_sizes(splits.train, renderer, False)
    longest = max(length for length, _ in sizes)
    layout = choose_layout(sizes, longest, batch_size, 256, packed=True, exact=False)
    return Feed(splits.train, renderer, batch_size, layout.cut, seed=5)


def test_every_row_appears_exactly_once_an_epoch_in_another_order_each(tmp_path, dense_path):
    source = feed(tmp_path, dense_path, [{"text": "x" * (i % 7 + 1)} for i in range(30)])
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
    first = sum((update.tally for update in updates[:3]), Tally())
    assert (first.rows, first.dropped, first.truncated, first.refused) == (12, 4, 4, 0)


def test_rows_that_all_train_nothing_are_an_error_before_training(tmp_path, dense_path):
    with pytest.raises(DataError, match=r"none of the 3 rows looked at .*max_length = 10"):
        feed(tmp_path, dense_path, [{"prompt": "x" * 50, "completion": "y"}] * 3, max_length=10)


def test_padded_rows_stand_under_each_other():
    batch = pad([example(4, start=2), example(3)])
    assert batch.inputs.tolist() == [[1, 2, 3], [1, 2, 0]]
    assert batch.positions.tolist() == [1, 2, 3, 4]  # of the six places, row by row
    assert batch.targets.tolist() == [3, 4, 2, 3]
    assert batch.weights.tolist() == [1] * 4
    assert (batch.shape, batch.tokens, batch.ends) == ((2, 3, 4), 4, (3,))


def test_packed_rows_stand_one_after_another():
    batch = pack([example(4, start=2), example(3)])
    assert batch.inputs.tolist() == [[1, 2, 3, 1, 2]]
    assert batch.positions.tolist() == [1, 2, 3, 4]
    assert batch.targets.tolist() == [3, 4, 2, 3]
    assert (batch.ends, batch.segments) == ((3, 5), None)


def test_a_given_shape_is_filled_with_what_trains_nothing():
    batch = pack([example(4, start=2), example(3)], (1, 8, 6), reach=4)
    assert batch.inputs.tolist() == [[1, 2, 3, 1, 2, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.weights.tolist() == [1, 1, 1, 1, 0, 0]
    assert (batch.shape, batch.tokens, batch.ends, batch.reach) == ((1, 8, 6), 4, (8,), 4)
    batch = pad([example(4, start=2), example(3)], (3, 5, 8))
    assert batch.inputs.tolist() == [[1, 2, 3, 0, 0], [1, 2, 0, 0, 0], [0] * 5]
    assert batch.positions.tolist()[:4] == [1, 2, 5, 6]
    assert (batch.shape, batch.tokens) == ((3, 5, 8), 4)


def test_order_is_a_function_of_seed_and_epoch():
    assert np.array_equal(permutation(100, 1, 2), permutation(100, 1, 2))
    assert not np.array_equal(permutation(100, 1, 2), permutation(100, 1, 3))
    assert not np.array_equal(permutation(100, 1, 2), permutation(100, 2, 2))
