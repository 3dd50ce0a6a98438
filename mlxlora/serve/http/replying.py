"""From the orders of a request to its response, whole or as a stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive

from mlxlora.serve.http.answering import (
    QUIET_SECONDS,
    EventStream,
    Numbered,
    Running,
    while_connected,
)
from mlxlora.serve.http.refusing import as_wire
from mlxlora.serve.http.service import Service
from mlxlora.serve.orders import End, Order, Piece
from mlxlora.serve.wire.answers import Head, Json, usage
from mlxlora.serve.wire.refusals import error_body


class Choice(Protocol):
    """A choice of either kind of answer: what it tells of the events that it is given."""

    def first(self) -> Json | None: ...
    def piece(self, piece: Piece) -> Json | None: ...
    def end(self, end: End) -> list[Json]: ...


@dataclass(frozen=True)
class Asked:
    """A request that was read. prompts: of each choice, the number of its prompt.

    chunk and whole write an answer of its kind (chat_answers.py, text_answers.py). slow: choices
    may take their time with an event.
    """

    head: Head
    orders: Sequence[Order]
    choices: Sequence[Any]
    prompts: Sequence[int]
    chunk: Callable[..., Json]
    whole: Callable[..., Json]
    stream: bool
    tells_usage: bool
    slow: bool = False


async def reply(service: Service, asked: Asked, receive: Receive) -> Response:
    """The answer, whole or as a stream; its orders are cancelled if the client goes away.

    Raises what Engine.submit does, Failed for an order's Fault, Gone for a client's absence.
    """
    running = Running(service.engine, asked.orders, asyncio.get_running_loop())
    if asked.stream:
        return EventStream(_chunks(service, running, asked), _error, running.cancel)
    return await while_connected(receive, _whole(service, running, asked))


def as_json(value: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


async def _whole(service: Service, running: Running, asked: Asked) -> Response:
    told = _Told(service, asked)
    try:
        async with aclosing(running.events()) as coming:
            async for events in coming:
                await told.take(events)
    finally:
        running.cancel()
        told.report()
    # Of many tokens' log-probabilities, seconds of writing: not here, where others are answered.
    return await asyncio.to_thread(
        lambda: as_json(asked.whole(asked.head, asked.choices, told.usage))
    )


async def _chunks(service: Service, running: Running, asked: Asked) -> AsyncIterator[list[Json]]:
    told = _Told(service, asked)
    chunk = partial(asked.chunk, asked.head)
    try:
        first = [choice.first() for choice in asked.choices]
        if any(first):
            yield [chunk([one]) for one in first if one is not None]
        async with aclosing(running.events(QUIET_SECONDS)) as coming:
            async for events in coming:
                new = await told.take(events)
                if new or not events:
                    yield [chunk([one]) for one in new]
        if asked.tells_usage:
            yield [chunk([], told.usage)]
    finally:
        running.cancel()
        told.report()


class _Told:
    """What the choices of one answer have told, and how they ended."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self._service, self._asked = service, asked
        self._ends: list[tuple[int, End]] = []
        self._began = time.monotonic()

    async def take(self, events: list[Numbered]) -> list[Json]:
        """The choices of the chunks that follow from events."""
        if self._asked.slow:
            return await asyncio.to_thread(self._take, events)
        return self._take(events)

    def _take(self, events: list[Numbered]) -> list[Json]:
        return [one for number, event in events for one in self._said(number, event)]

    def _said(self, number: int, event: Any) -> list[Json]:
        choice: Choice = self._asked.choices[number]
        if isinstance(event, End):
            self._ends.append((self._asked.prompts[number], event))
            return choice.end(event)
        new = choice.piece(event)
        return [] if new is None else [new]

    @property
    def usage(self) -> Json:
        return usage(self._ends)

    def report(self) -> None:
        """A line for whoever runs the server."""
        if len(self._ends) < len(self._asked.choices):
            self._service.say(f"{self._asked.head.model}  not completed")
            return
        total, seconds = self.usage, time.monotonic() - self._began
        cached = total["prompt_tokens_details"]["cached_tokens"]
        known = f" ({cached:,} kept)" if cached else ""
        self._service.say(
            f"{self._asked.head.model}  {total['prompt_tokens']:,} tokens{known} -> "
            f"{total['completion_tokens']:,} in {seconds:.1f} s"
        )


def _error(error: Exception) -> Json:
    return error_body(as_wire(error))
