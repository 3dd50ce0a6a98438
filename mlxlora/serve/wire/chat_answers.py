"""Answers to chats as OpenAI writes them: whole, or chunk by chunk.

A choice takes events and gives deltas; what it gave, added up, is its whole answer, so both ways
of asking tell the same. Log-probabilities are those of all tokens that the model gave, thoughts
and marks included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlxlora.serve.orders import End, Piece, Spelled
from mlxlora.serve.wire.answers import Head, Json, number
from mlxlora.serve.wire.speech import Call, Said, Speech
from mlxlora.serve.wire.spelling import Spelling


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
            before = len(self._calls)
            delta["tool_calls"] = [
                {"index": before + place, **_written(call)} for place, call in enumerate(said.calls)
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
        "logprob": number(logprob),
    }
