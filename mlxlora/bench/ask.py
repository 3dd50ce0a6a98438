"""One question to a server of OpenAI's API, and what its client saw: text, counts, moments."""

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from mlxlora.bench.wire import Address, BrokenAnswer, Connection, Events, Reply

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DONE = "[DONE]"
TOLD = 400  # characters of a refusal that are told


@dataclass(frozen=True)
class Question:
    """body is as the server at hand wants it."""

    number: int
    path: str  # COMPLETIONS or CHAT
    body: dict[str, Any]


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, said: str, seconds: float = 0.0) -> None:
        super().__init__(f"status {status}: {said[:TOLD]}" if status else said[:TOLD])
        self.status = status
        self.seconds = seconds  # after how long asking again makes sense


@dataclass(frozen=True)
class Answer:
    """A whole answer. Moments are seconds of one clock."""

    number: int  # of its question
    text: str
    reason: str
    prompt_tokens: int
    tokens: int  # generated
    asked: float
    first: float  # when the first text came, not the stream's opening
    last: float  # when the last text came
    ended: float

    @property
    def wait(self) -> float:
        """Seconds to the first text."""
        return self.first - self.asked

    @property
    def decoding_rate(self) -> float:
        """Tokens per second after the first."""
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first else 0.0


def _nothing() -> None: ...


async def ask(address: Address, question: Question, heard: Callable[[], None] = _nothing) -> Answer:
    """Ask, and take the answer in. Raises Refused, BrokenAnswer or OSError.

    heard is called for every piece of text that comes.
    """
    asked = time.perf_counter()
    async with Connection(address) as connection:
        await connection.send("POST", question.path, question.body)
        return await listen(await connection.reply(), question.number, asked, heard)


async def listen(
    reply: Reply, number: int, asked: float, heard: Callable[[], None] = _nothing
) -> Answer:
    """The whole answer, streamed or not. Raises Refused or BrokenAnswer."""
    texts: list[str] = []
    first = last = 0.0
    usage: dict[str, Any] = {}
    reason = ""
    async for value in values(reply):
        usage = value.get("usage") or usage
        for choice in value.get("choices") or ():
            reason = choice.get("finish_reason") or reason
            if text := text_of(choice):
                last = time.perf_counter()
                first = first or last
                texts.append(text)
                heard()
    ended = time.perf_counter()
    if not reason:
        raise BrokenAnswer("the answer ended without a reason why")
    return Answer(
        number,
        "".join(texts),
        reason,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        tokens=int(usage.get("completion_tokens") or 0),
        asked=asked,
        first=first or ended,
        last=last or ended,
        ended=ended,
    )


async def values(reply: Reply) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of an answer: one, or those of a stream up to its [DONE].

    Raises Refused for a status that is not 200 and for an error in mid-stream, BrokenAnswer for
    a stream without its end and for what is no JSON.
    """
    if reply.status != 200:
        said = (await reply.body()).decode("utf-8", "replace")
        raise Refused(reply.status, said, _seconds(reply.headers.get("retry-after", "")))
    if "text/event-stream" not in reply.headers.get("content-type", ""):
        yield _parsed(await reply.body())
        return
    events = Events()
    async for piece in reply.pieces():
        for data in events.feed(piece):
            if data == DONE:
                return
            yield _parsed(data)
    raise BrokenAnswer(f"the stream ended without {DONE}")


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BrokenAnswer(f"no JSON: {text[:TOLD]!r}") from error
    if not isinstance(value, dict):
        raise BrokenAnswer(f"no JSON object: {text[:TOLD]!r}")
    if "error" in value:
        raise Refused(0, f"in mid-stream: {json.dumps(value['error'])}")
    return value


def text_of(choice: dict[str, Any]) -> str:
    """What a choice adds to the answer, its reasoning included."""
    message = choice.get("delta") or choice.get("message") or {}
    parts = (choice.get("text"), message.get("reasoning"), message.get("content"))
    return "".join(part for part in parts if part)


def _seconds(told: str) -> float:
    return float(told) if told.isdecimal() else 0.0
