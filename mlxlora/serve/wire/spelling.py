"""Tokens one by one as text and bytes: pieces of a letter among them, special tokens too."""

from functools import lru_cache
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer

KEPT = 1 << 16  # tokens; twenty likeliest of each place are few different ones


class Spelling:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._kept = lru_cache(KEPT)(self._raw)
        self._added = {
            number: token.content for number, token in tokenizer.added_tokens_decoder.items()
        }

    def raw(self, token: int) -> bytes:
        """Its bytes; none for a token that only the model knows."""
        return self._kept(token)

    def _raw(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        kind = self._tokenizer._detokenizer
        if isinstance(kind, BPEStreamingDetokenizer):
            bytes_of = _byte_letters()
            if all(letter in bytes_of for letter in piece):
                return bytes(bytes_of[letter] for letter in piece)
            return piece.encode(errors="replace")
        if isinstance(kind, SPMStreamingDetokenizer):
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("▁", " ").encode(errors="replace")
        return str(self._tokenizer.decode([token])).encode(errors="replace")

    def text(self, token: int) -> str:
        """Its bytes as text; what is no letter alone becomes U+FFFD."""
        return self.raw(token).decode(errors="replace")


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes (Radford et al. 2019, GPT-2).

    Printable bytes of Latin-1 stand for themselves, the others for letters from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
