"""A cleaned copy: which lines are in it, byte for byte, and that training takes it."""

import gzip
import json
import os

import pytest
from conftest import write_rows, write_tokenizer
from mlx_lm.utils import load_tokenizer
from test_inspect import pairs

from mlxlora.config import DataConfig
from mlxlora.data.inspect.clean import check_target, clean
from mlxlora.data.inspect.summary import inspect
from mlxlora.data.records import open_splits
from mlxlora.errors import ConfigError, DataError, ExportError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory, eos_token_ids=[258])


@pytest.fixture
def dirty(tmp_path):
    """(directory, lines of train that are good)."""
    directory = tmp_path / "dirty"
    directory.mkdir()
    good = [json.dumps(row, indent=None) for row in pairs(30)]
    held = [json.dumps(row) for row in pairs(5, seed=1)]
    near = json.dumps({**pairs(30)[4], "prompt": pairs(30)[4]["prompt"].upper()})
    lines = [
        *good[:10],
        "{ broken",
        good[3],
        '{"text": "another format"}',
        held[2],
        "",
        near,
        json.dumps({"prompt": "long " * 600, "completion": "cut off"}),
        *good[10:],
    ]
    (directory / "train.jsonl").write_text("\n".join(lines))
    (directory / "valid.jsonl").write_text("\n".join([*held, held[0]]) + "\n")
    return directory, good, near, held


def looked_at(path, tokenizer):
    return inspect(DataConfig(path=str(path)), tokenizer, every=True)


def test_what_is_left_is_byte_for_byte_and_the_counts_add_up(dirty, tokenizer, tmp_path):
    directory, good, near, held = dirty
    done = clean(looked_at(directory, tokenizer), tmp_path / "out", near=False)
    train = (tmp_path / "out" / "train.jsonl").read_text()
    assert train == "\n".join([*good[:10], near, *good[10:]])
    assert (tmp_path / "out" / "valid.jsonl").read_text() == "\n".join(held) + "\n"
    assert done.dropped == {"bad": 1, "format": 1, "nothing": 1, "exact": 2, "leaks": 1}
    assert done.lines == sum(done.kept.values()) + sum(done.dropped.values())


def test_near_copies_go_only_when_asked(dirty, tokenizer, tmp_path):
    directory, good, near, _ = dirty
    done = clean(looked_at(directory, tokenizer), tmp_path / "out", near=True)
    lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert done.dropped["near"] == 1 and near not in lines and good[4] in lines
    assert done.lines == sum(done.kept.values()) + sum(done.dropped.values())


def test_training_takes_the_copy_and_a_second_look_finds_nothing(dirty, tokenizer, tmp_path):
    directory, *_ = dirty
    with pytest.raises(DataError):
        open_splits(DataConfig(path=str(directory)), 0)
    clean(looked_at(directory, tokenizer), tmp_path / "out", near=True)
    splits = open_splits(DataConfig(path=str(tmp_path / "out")), 0)
    assert len(splits.train) == 30 and len(splits.valid) == 5
    again = looked_at(tmp_path / "out", tokenizer)
    assert again.verdict.found == "Ready to train; nothing to mend."


def test_a_single_file_and_gzip_become_one_file(tokenizer, tmp_path):
    rows = pairs(20)
    packed = tmp_path / "rows.jsonl.gz"
    text = "\n".join(json.dumps(row) for row in [*rows, rows[2]])
    packed.write_bytes(gzip.compress(text.encode()))
    out = tmp_path / "clean.jsonl"
    done = clean(looked_at(packed, tokenizer), out, near=False)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert done.kept == {"clean.jsonl": 20} and done.dropped == {"exact": 1}


def test_nothing_is_overwritten_and_nothing_half_written(dirty, tokenizer, tmp_path, monkeypatch):
    directory, *_ = dirty
    found = looked_at(directory, tokenizer)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("keep")
    for refuse in (lambda: check_target(taken, directory), lambda: clean(found, taken, False)):
        with pytest.raises(ExportError, match="never overwritten"):
            refuse()
    before = sorted(os.listdir(tmp_path))

    def full(self, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlxlora.data.inspect.scan.Source.line", full)
    with pytest.raises(OSError, match="No space"):
        clean(found, tmp_path / "out", False)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_copy_of_a_file_is_named_as_one(tmp_path):
    with pytest.raises(ConfigError, match="jsonl"):
        check_target(tmp_path / "out", tmp_path / "rows.jsonl")


def test_a_copy_that_would_be_empty_is_refused(tokenizer, tmp_path):
    rows = pairs(10)
    write_rows(tmp_path / "train.jsonl", rows[:5])
    write_rows(tmp_path / "valid.jsonl", rows)
    with pytest.raises(DataError, match=r"no row .* would be left"):
        clean(looked_at(tmp_path, tokenizer), tmp_path / "out", False)
