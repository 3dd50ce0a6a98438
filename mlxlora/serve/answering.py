"""Orders as asyncio sees them: events awaited, and cancelled with whoever no longer waits."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlxlora.serve.engine import Engine, Ticket
from mlxlora.serve.orders import End, Event, Fault, Order

QUIET_SECONDS = 15.0  # after which a stream says that it is still there
Numbered = tuple[int, Event]
T = TypeVar("T")


class Gone(Exception):
    """The client is not there any more."""


class Failed(Exception):
    """One of the orders ended in a Fault."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class Running:
    """The orders of one request, submitted; their events as they come."""

    def __init__(
        self, engine: Engine, orders: Sequence[Order], loop: asyncio.AbstractEventLoop
    ) -> None:
        """loop: where events are awaited. Raises what Engine.submit does; then none is left."""
        self._loop = loop
        self._events: asyncio.Queue[Numbered] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self.left = len(orders)
        engine.check_room(len(orders))
        try:
            for number, order in enumerate(orders):
                self._tickets.append(engine.submit(order, partial(self._tell, number)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    async def events(
        self, quiet_seconds: float | None = None
    ) -> AsyncGenerator[list[Numbered], None]:
        """What has come in, whenever something has; nothing after quiet_seconds of silence.

        Ends when every order has its End. Raises Failed at the first Fault.
        """
        while self.left:
            try:
                async with asyncio.timeout(quiet_seconds):
                    found = [await self._events.get()]
            except TimeoutError:
                yield []
                continue
            while not self._events.empty():
                found.append(self._events.get_nowait())
            for _, event in found:
                if isinstance(event, Fault):
                    raise Failed(event)
                self.left -= isinstance(event, End)
            yield found

    def _tell(self, number: int, event: Event) -> None:
        """In the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of work, which is cancelled if the client goes away. Raises Gone then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        raise Gone
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, each a JSON object; closing ends the stream that they come from."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[list[dict[str, Any]]],
        failed: Callable[[Exception], dict[str, Any]],
        ended: Callable[[], None],
    ) -> None:
        """failed: what is said of an error in mid-stream. ended: called however it ends."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._failed, self._ended = chunks, failed, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(head)
            await while_connected(receive, self._write(send))
        except Gone:
            return
        finally:
            self._ended()

    async def _write(self, send: Send) -> None:
        async def say(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            async for chunks in self._chunks:
                lines = (b"data: %b\n\n" % orjson.dumps(chunk) for chunk in chunks)
                await say(b"".join(lines) or b": still at it\n\n")
        except Exception as error:  # the status is sent already: it can only be said here
            await say(b"data: %b\n\n" % orjson.dumps(self._failed(error)))
        await say(b"data: [DONE]\n\n", more=False)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
