"""Tokens one by one, against mlx-lm's own decoding of them together."""

import pytest
from conftest import SPECIAL, write_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.normalizers import Replace

from mlxlora.base import open_tokenizer
from mlxlora.serve.wire.spelling import Spelling


@pytest.fixture
def byte_tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    return open_tokenizer(tmp_path, {})


@pytest.fixture
def spm_tokenizer(tmp_path):
    """In the structure of Llama 2's: spaces as U+2581, other bytes as <0x..>."""
    write_tokenizer(tmp_path)
    words = ["<unk>", "▁", "a", "b", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
    )
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    made.save(str(tmp_path / "tokenizer.json"))
    return open_tokenizer(tmp_path, {})


TEXTS = ["a b", "aé€ 🙂\n", "<|im_start|>a<|im_end|>", "\x00~ÿĀ"]


@pytest.mark.parametrize("kind", ["byte_tokenizer", "spm_tokenizer"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_together_are_the_text(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    spelling = Spelling(tokenizer)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(spelling.raw, tokens)).decode() == text


def test_half_a_letter_is_told_as_bytes(byte_tokenizer):
    spelling = Spelling(byte_tokenizer)
    first = byte_tokenizer.encode("€")[0]
    assert spelling.raw(first) == b"\xe2" and spelling.text(first) == "�"


def test_a_token_that_only_the_model_knows_has_no_bytes(byte_tokenizer):
    assert Spelling(byte_tokenizer).raw(5000) == b""
