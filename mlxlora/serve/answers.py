"""What the engine tells, as OpenAI writes answers: whole, or chunk by chunk.

A choice takes events and gives deltas; what it gave, added up, is its whole answer, so both ways
of asking tell the same. Log-probabilities of a chat are those of all tokens that the model gave,
thoughts and marks included.
"""

import codecs
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from mlxlora.serve.orders import End, Piece, Spelled
from mlxlora.serve.speech import Call, Said, Speech
from mlxlora.serve.spelling import Spelling

LEAST = -9999.0  # how OpenAI writes the log-probability of what cannot be
Json = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What all parts of one answer begin with."""

    id: str
    model: str
    fingerprint: str
    created: int  # seconds since the epoch

    def part(self, object: str, choices: list[Json], usage: Json | None = None) -> Json:
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **({} if usage is None else {"usage": usage}),
        }


def head(kind: str, model: str, fingerprint: str) -> Head:
    """kind: "chatcmpl" or "cmpl". model: as the request named it."""
    return Head(f"{kind}-{token_hex(12)}", model, fingerprint, int(time.time()))


def usage(ends: Sequence[tuple[int, End]]) -> Json:
    """ends: of each choice the number of its prompt, and how it ended; a prompt counts once."""
    prompts = {}
    for number, end in ends:
        prompts.setdefault(number, end)
    prompt = sum(end.prompt_tokens for end in prompts.values())
    completion = sum(end.tokens for _, end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(end.cached_tokens for end in prompts.values())
        },
    }


# Chats


@dataclass
class ChatChoice:
    """One choice of a chat."""

    index: int
    speech: Speech
    spelling: Spelling | None = None  # where log-probabilities are told
    reason: str | None = None
    _content: str = ""
    _reasoning: str = ""
    _calls: list[Call] = field(default_factory=list)
    _tokens: list[Spelled] = field(default_factory=list)
    _told: int = 0  # tokens of those

    def first(self) -> Json:
        """The choice that a stream begins with."""
        return self._choice({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> Json | None:
        """The next chunk's choice; None if nothing is certain yet."""
        self._tokens += piece.tokens
        said = self.speech.feed(piece.text)
        return self._choice(self._delta(said)) if said else None

    def end(self, end: End) -> list[Json]:
        """The choices of the last chunks: what was held back, then why it ended."""
        said = self.speech.end()
        chunks = []
        if said or self._told < len(self._tokens):
            chunks.append(self._choice(self._delta(said)))
        self.reason = self.speech.reason(end.reason)
        chunks.append(self._choice({}, self.reason))
        return chunks

    def whole(self) -> Json:
        """The choice of a whole answer, after end()."""
        message: Json = {"role": "assistant", "content": self._content}
        if self._calls:
            message["tool_calls"] = [_written(call) for call in self._calls]
            message["content"] = self._content or None
        if self._reasoning:
            message |= _thought(self._reasoning)
        message["refusal"] = None
        return {
            "index": self.index,
            "message": message,
            "logprobs": self._logprobs(self._tokens),
            "finish_reason": self.reason,
        }

    def _delta(self, said: Said) -> Json:
        delta: Json = {}
        if said.reasoning:
            delta |= _thought(said.reasoning)
        if said.content:
            delta["content"] = said.content
        if said.calls:
            first = len(self._calls)
            delta["tool_calls"] = [
                {"index": first + number, **_written(call)}
                for number, call in enumerate(said.calls)
            ]
        self._content += said.content
        self._reasoning += said.reasoning
        self._calls += said.calls
        return delta

    def _choice(self, delta: Json, reason: str | None = None) -> Json:
        new, self._told = self._tokens[self._told :], len(self._tokens)
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": self._logprobs(new) if new else None,
            "finish_reason": reason,
        }

    def _logprobs(self, tokens: Sequence[Spelled]) -> Json | None:
        if self.spelling is None:
            return None
        return {"content": [_chat_token(self.spelling, one) for one in tokens], "refusal": None}


def chat_chunk(head: Head, choices: list[Json], usage: Json | None = None) -> Json:
    return head.part("chat.completion.chunk", choices, usage)


def chat_completion(head: Head, choices: Sequence[ChatChoice], usage: Json) -> Json:
    return head.part("chat.completion", [choice.whole() for choice in choices], usage)


# Completions


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
        self._at = len(self.echo)
        self._decoder.errors = "replace"

    def first(self) -> Json | None:
        """What a stream begins with, if there is something."""
        return self._choice(self._add(self.echo)) if self.echo else None

    def piece(self, piece: Piece) -> Json | None:
        if not self._text and self.echo:  # of a whole answer
            self._add(self.echo)
        self._take(piece.tokens)
        return self._choice(self._add(piece.text)) if piece.text else None

    def end(self, end: End) -> list[Json]:
        if not self._text and self.echo:
            self._add(self.echo)
        self.reason = end.reason
        return [self._choice("", self.reason)]

    def whole(self) -> Json:
        return {
            "index": self.index,
            "text": self._text,
            "logprobs": self._logprobs(0),
            "finish_reason": self.reason,
        }

    def _add(self, text: str) -> str:
        self._text += text
        return text

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
            "token_logprobs": [_number(one.logprob) for one in tokens],
            "top_logprobs": [
                {_name(spelling, token): _number(value) for token, value in reversed(one.top)}
                for one in tokens
            ],
            "text_offset": self._offsets[begin:],
        }


def completion(head: Head, choices: Sequence[TextChoice], usage: Json) -> Json:
    return head.part("text_completion", [choice.whole() for choice in choices], usage)


def completion_chunk(head: Head, choices: list[Json], usage: Json | None = None) -> Json:
    return head.part("text_completion", choices, usage)


def _thought(text: str) -> Json:
    """Reasoning by both names that clients look for."""
    return {"reasoning": text, "reasoning_content": text}


def _written(call: Call) -> Json:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _chat_token(spelling: Spelling, one: Spelled) -> Json:
    return {
        **_token(spelling, one.token, one.logprob),
        "top_logprobs": [_token(spelling, token, value) for token, value in one.top],
    }


def _token(spelling: Spelling, token: int, logprob: float) -> Json:
    return {
        "token": spelling.text(token),
        "bytes": list(spelling.raw(token)),
        "logprob": _number(logprob),
    }


def _name(spelling: Spelling, token: int) -> str:
    """A token where names tell tokens apart: as text, or by the bytes that are none."""
    raw = spelling.raw(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST
