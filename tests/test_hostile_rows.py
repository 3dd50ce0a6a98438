"""Rows that nobody should have: usable records, or one DataError; no other end."""

import gzip
import json
import os
import tempfile
from pathlib import Path

import pytest
from conftest import SPECIAL, write_tokenizer
from hostile import DEEP, JSON_TEXTS, damaged, json_text, mutated, nothing_written, value_or_error
from hypothesis import given
from hypothesis import strategies as st

from mlxlora.base import open_tokenizer
from mlxlora.config import DataConfig
from mlxlora.data.batches import render_row
from mlxlora.data.records import open_splits
from mlxlora.data.render import Renderer
from mlxlora.errors import DataError

CALL = {"function": {"name": "f", "arguments": '{"a": 1}'}}
ROWS = [
    {"text": "a text"},
    {"prompt": "a", "completion": "b", "system": "s"},
    {"instruction": "a", "input": "b", "output": "c"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "<think>x</think>b", "reasoning_content": "r"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in [*ROWS[-1:], *ROWS[-1:], *ROWS[3:4]])


@pytest.fixture(scope="module")
def renderer(tmp_path_factory) -> Renderer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    return Renderer(open_tokenizer(directory, {}), DataConfig(max_length=64))


def read(what: str, data: bytes, renderer: Renderer, *, name: str = "rows.jsonl", skip: bool):
    """Read and render every row of a file that holds data."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inner" / name
        path.parent.mkdir()
        path.write_bytes(data)
        rule = "skip" if skip else "error"
        config = DataConfig(path=str(path), on_bad_row=rule, valid_fraction=0.3)
        with nothing_written(Path(folder)), value_or_error(what, DataError):
            splits = open_splits(config, 0)
            for rows in (splits.train, splits.valid):
                for number in range(len(rows or ())):
                    render_row(rows, number, renderer, skip)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes(renderer, data, skip):
    read("rows: any bytes", data, renderer, skip=skip)


@given(damaged(LINES), st.booleans())
def test_damaged_lines(renderer, data, skip):
    read("rows: damaged lines", data, renderer, skip=skip)


@given(damaged(gzip.compress(LINES, mtime=0)) | st.binary(max_size=100), st.booleans())
def test_damaged_gzip(renderer, data, skip):
    read("rows: damaged gzip", data, renderer, name="rows.jsonl.gz", skip=skip)


@given(st.lists(st.sampled_from(ROWS).flatmap(mutated), min_size=1, max_size=3), st.booleans())
def test_rows_with_something_wrong_anywhere(renderer, rows, skip):
    data = "\n".join(map(json_text, rows)).encode()
    read("rows: wrong anywhere", data, renderer, skip=skip)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_in_a_turn(renderer, asked, answer):
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    data = json_text({"messages": turns}).encode()
    read("rows: any text in a turn", data, renderer, skip=False)


@pytest.mark.parametrize(
    "text", [*JSON_TEXTS, *SPECIAL, "\r\n\r\n", '{"text": "a"}\r{"text": "b"}']
)
@pytest.mark.parametrize("skip", [False, True])
def test_texts_that_no_tree_gives(renderer, text, skip):
    read("rows: odd texts", text.encode("utf-8", "surrogatepass"), renderer, skip=skip)
    read("rows: odd texts", b'{"text": "a"}\n' + text.encode(), renderer, skip=skip)


def test_a_line_of_fifty_megabytes_and_deep_arguments(renderer):
    for end in (b"", b'", "x": "'):
        line = b'{"text": "' + b"a" * 100_000 + end + b"b" * (50 << 20)
        read("rows: long line", line + (b'"}' if end else b""), renderer, skip=False)
    call = {"function": {"name": "f", "arguments": "[" * DEEP}}
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    read("rows: deep arguments", json_text(row).encode(), renderer, skip=False)


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    rows = open_splits(DataConfig(path=str(path), valid_fraction=0), 0).train
    assert [record.text for record in rows] == ["a", "b"]
    assert rows.where(rows[1]) == f"{path}:3"


def test_a_role_beside_from_does_not_replace_it(tmp_path, renderer):
    turns = [
        {"from": "human", "value": "a", "role": 5, "content": {}},
        {"from": "gpt", "value": "b"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json_text({"conversations": turns}))
    rows = open_splits(DataConfig(path=str(path), valid_fraction=0), 0).train
    assert [m["role"] for m in rows[0].messages] == ["user", "assistant"]
    assert renderer(rows[0]).supervised


def odd_places(directory: Path) -> list[Path]:
    """Names that end in .jsonl and are no file of rows."""
    places = {
        name: directory / f"{name}.jsonl" for name in ("none", "loop", "folder", "pipe", "zero")
    }
    places["none"].symlink_to(directory / "nowhere")
    places["loop"].symlink_to(places["loop"])
    places["folder"].mkdir()
    os.mkfifo(places["pipe"])
    places["zero"].symlink_to("/dev/zero")
    return list(places.values())


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    for place in [*odd_places(tmp_path), tmp_path / ("x" * 5000 + ".jsonl"), Path("a\0b.jsonl")]:
        with pytest.raises(DataError):
            open_splits(DataConfig(path=str(place)), 0)
    for name in ("loop", "pipe"):
        train = tmp_path / name / "train.jsonl"
        train.parent.mkdir()
        os.rename(tmp_path / f"{name}.jsonl", train)
        with pytest.raises(DataError, match=r"cannot read .*train\.jsonl"):
            open_splits(DataConfig(path=str(train.parent)), 0)
    with pytest.raises(DataError, match="~nobody-at-all"):
        open_splits(DataConfig(path="~nobody-at-all/rows.jsonl"), 0)
