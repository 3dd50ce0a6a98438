"""Continuations as OpenAI writes them: whole, or chunk by chunk."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxlora.serve.orders import End, Piece, Spelled
from mlxlora.serve.wire.answers import Head, Json, number
from mlxlora.serve.wire.spelling import Spelling


@dataclass
class TextChoice:
    """One choice of a completion. echo: the prompt, if its text shall begin with it."""

    index: int
    echo: str = ""
    spelling: Spelling | None = None
    reason: str | None = None
    _text: str = ""
    _tokens: list[Spelled] = field(default_factory=list)
    _offsets: list[int] = field(default_factory=list)  # where each token's text begins, characters
    _decoder: Any = field(default_factory=codecs.getincrementaldecoder("utf-8"))
    _told: int = 0

    def __post_init__(self) -> None:
        self._text, self._at = self.echo, len(self.echo)
        self._decoder.errors = "replace"

    def first(self) -> Json | None:
        """What a stream begins with, if there is something."""
        return self._choice(self.echo) if self.echo else None

    def piece(self, piece: Piece) -> Json | None:
        """The next chunk's choice; None if there is no text yet."""
        self._text += piece.text
        self._take(piece.tokens)
        return self._choice(piece.text) if piece.text else None

    def end(self, end: End) -> list[Json]:
        """The choice of the last chunk."""
        self.reason = end.reason
        return [self._choice("", self.reason)]

    def whole(self) -> Json:
        return {
            "index": self.index,
            "text": self._text,
            "logprobs": self._logprobs(0),
            "finish_reason": self.reason,
        }

    def _take(self, tokens: Sequence[Spelled]) -> None:
        for one in tokens:
            self._tokens.append(one)
            self._offsets.append(self._at)
            if self.spelling is not None:
                self._at += len(self._decoder.decode(self.spelling.raw(one.token)))

    def _choice(self, text: str, reason: str | None = None) -> Json:
        begin, self._told = self._told, len(self._tokens)
        return {
            "index": self.index,
            "text": text,
            "logprobs": self._logprobs(begin) if begin < self._told else None,
            "finish_reason": reason,
        }

    def _logprobs(self, begin: int) -> Json | None:
        spelling = self.spelling
        if spelling is None:
            return None
        tokens = self._tokens[begin:]
        return {
            "tokens": [_name(spelling, one.token) for one in tokens],
            "token_logprobs": [number(one.logprob) for one in tokens],
            "top_logprobs": [
                {_name(spelling, token): number(value) for token, value in reversed(one.top)}
                for one in tokens
            ],
            "text_offset": self._offsets[begin:],
        }


def completion(head: Head, choices: Sequence[TextChoice], usage: Json) -> Json:
    return head.part("text_completion", [choice.whole() for choice in choices], usage)


def completion_chunk(head: Head, choices: list[Json], usage: Json | None = None) -> Json:
    return head.part("text_completion", choices, usage)


def _name(spelling: Spelling, token: int) -> str:
    """A token where names tell tokens apart: as text, or by the bytes that are none."""
    raw = spelling.raw(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
