import gzip
import json

import numpy as np
import pytest
from conftest import write_rows

from mlxlora.config import DataConfig
from mlxlora.data.records import RowFault, open_splits, parse
from mlxlora.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.mark.parametrize(
    "row, kind, said",
    [
        (CHAT, "chat", [("user", "hi"), ("assistant", "ho")]),
        ({"prompt": "hi", "completion": "ho"}, "completion", [("user", "hi"), ("assistant", "ho")]),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            "completion",
            [("user", "add\n\n1 2"), ("assistant", "3")],
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            "chat",
            [("user", "hi"), ("assistant", "ho")],
        ),
        ({"text": "plain"}, "text", []),
    ],
)
def test_every_row_format_is_read(row, kind, said):
    record = parse(row, {})
    assert record.kind == kind
    assert [(m["role"], m["content"]) for m in record.messages] == said


def test_tools_and_tool_calls_reach_the_template_as_objects():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    record = parse(row, {})
    assert record.tools and record.tools[0]["function"]["name"] == "f"
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_columns_rename_keys():
    record = parse({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"})
    assert record.messages[1]["content"] == "a"


def test_unknown_keys_are_named_with_the_option_that_helps():
    with pytest.raises(RowFault) as fault:
        parse({"question": "q", "answer": "a"}, {})
    assert "'question', 'answer'" in str(fault.value)
    assert "data.columns.prompt=question" in str(fault.value)


@pytest.mark.parametrize(
    "row, says",
    [
        ([1], "must be a JSON object, this is a list"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant turn"),
        ({"messages": [{"content": "hi"}]}, "message 1 has no 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text, this is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"prompt": "x"}, "'completion' is missing"),
        ({"prompt": "x", "completion": None}, "'completion' is missing"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "preference"),
        ({"text": {"a": 1}}, "'text' must be text, this is an object"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, says):
    with pytest.raises(RowFault, match=says.replace("(", r"\(")):
        parse(row, {})


@pytest.mark.parametrize(
    "line, says",
    [
        (b'{"text": "cut', r"rows.jsonl:3: not valid JSON .*near '.*cut'"),
        (b'{"text": "caf\xe9"}', "rows.jsonl:3: not UTF-8 at byte 14"),
        (b'{"prompt": "a", "completion": "b"}', "a completion row in a file of text rows"),
        (b"[]", "must be a JSON object"),
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
