"""Rows as text to look at."""

import numpy as np
import pytest
from conftest import write_rows

from mlxlora.config import DataConfig
from mlxlora.data.records import open_file
from mlxlora.data.render import Example, Renderer
from mlxlora.data.shown import pieces


@pytest.fixture
def chat(dense, tmp_path):
    """An example of a chat row, and its tokenizer."""
    row = {
        "messages": [
            {"role": "user", "content": "héllo 🙂"},
            {"role": "assistant", "content": "grüß 🙂 dich"},
        ]
    }
    data = DataConfig(path=str(write_rows(tmp_path / "rows.jsonl", [row])))
    return Renderer(dense.tokenizer, data)(open_file(tmp_path / "rows.jsonl", data)[0])


def test_pieces_joined_are_the_row(dense, chat):
    found = pieces(chat, dense.tokenizer)
    assert "".join(piece.text for piece in found) == dense.tokenizer.decode(chat.tokens.tolist())
    assert sum(piece.tokens for piece in found) == len(chat.tokens)


def test_trained_and_special_stretches_are_told_apart(dense, chat):
    found = pieces(chat, dense.tokenizer)
    assert [piece.text for piece in found if piece.trained] == ["grüß 🙂 dich", "<|im_end|>"]
    assert [piece.text for piece in found if piece.special] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_a_character_whose_tokens_are_not_trained_alike_stays_whole(dense):
    tokens = np.asarray(dense.tokenizer.encode("a🙂b"), np.int32)
    mask = np.asarray([True, False, False, True, True, True])
    found = pieces(Example(0, tokens, mask), dense.tokenizer)
    assert [(piece.text, piece.trained) for piece in found] == [("a", False), ("🙂b", True)]
