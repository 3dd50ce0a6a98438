import gzip
import json

import numpy as np
import pytest
from conftest import write_rows

from mlxlora.config import DataConfig
from mlxlora.data.records import open_splits
from mlxlora.errors import DataError


@pytest.mark.parametrize(
    "line, says",
    [
        (b'{"text": "cut', r"rows.jsonl:3: not valid JSON .*near '.*cut'"),
        (b'{"text": "caf\xe9"}', "rows.jsonl:3: not UTF-8 at byte 14"),
        (b'{"prompt": "a", "completion": "b"}', "a completion row in a file of text rows"),
        (b"[]", "must be a JSON object"),
        (b"[", "one JSON array"),
    ],
)
def test_a_bad_line_is_found_before_training_or_skipped(tmp_path, line, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(DataError, match=says):
        open_splits(DataConfig(path=str(path)), 0)
    data = DataConfig(path=str(path), on_bad_row="skip", valid_fraction=0)
    splits = open_splits(data, 0)
    assert [record.text for record in splits.train] == ["one", "two"]
    assert splits.train.file.skipped == 1


def test_missing_and_empty_data_are_named(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    for path, says in (
        (empty, "no usable rows"),
        (tmp_path / "none.jsonl", "no data at"),
        (tmp_path, "has no train.jsonl"),
    ):
        with pytest.raises(DataError, match=says):
            open_splits(DataConfig(path=str(path)), 0)


def test_gzip_gives_the_same_rows_and_a_damaged_one_is_named(tmp_path):
    lines = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(50))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode()))
    splits = open_splits(DataConfig(path=str(path), valid_fraction=0), 0)
    assert [record.text for record in splits.train] == [f"row {i}" for i in range(50)]
    path.write_bytes(gzip.compress(lines.encode())[:-30])
    with pytest.raises(DataError, match="not a whole gzip file"):
        open_splits(DataConfig(path=str(path)), 0)


def test_a_single_file_is_split_by_content_so_equal_rows_stay_together(tmp_path):
    rows = [{"text": f"row {i % 400}"} for i in range(2000)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    splits = open_splits(DataConfig(path=str(path)), 0)
    train = {record.text for record in splits.train}
    valid = {record.text for record in splits.valid}
    assert not train & valid
    assert 20 < len(valid) < 70
    assert len(splits.train) + len(splits.valid) == 2000
    again = open_splits(DataConfig(path=str(path)), 0)
    other = open_splits(DataConfig(path=str(path)), 1)
    assert np.array_equal(again.valid.index, splits.valid.index)
    assert not np.array_equal(other.valid.index, splits.valid.index)


def test_the_index_costs_twelve_bytes_a_row(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "x" * 500}] * 1000)
    file = open_splits(DataConfig(path=str(path), valid_fraction=0), 0).train.file
    assert file.offsets.nbytes + file.hashes.nbytes == 12 * 1000


def test_where_counts_lines_not_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n\n{"text": "b"}\n')
    rows = open_splits(DataConfig(path=str(path), valid_fraction=0), 0).train
    assert rows.where(rows[1]) == f"{path}:4"


def test_files_of_a_directory_must_agree_on_the_format(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"text": "a"}])
    write_rows(tmp_path / "valid.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"completion rows and .* text rows"):
        open_splits(DataConfig(path=str(tmp_path)), 0)
