"""HTTP/1.1 as uvicorn speaks it, with limits on what a client may take without saying anything.

uvicorn times idle connections between requests only; one that sends a header a minute would be
waited for without end, and so would one that does not read its answer. Where all connections are
taken, the one that has kept the server waiting longest makes room for the next.
"""

import asyncio
from typing import Any

import h11
import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlxlora.serve.wire.refusals import WireError, error_body

HEADER_SECONDS = 10.0
HEADER_BYTES = 32 << 10
IDLE_SECONDS = 30  # between two requests
UNREAD_SECONDS = 60.0  # that a full buffer may wait for its client
MOST_CONNECTIONS = 512


class TimedProtocol(H11Protocol):
    """Closes a connection whose next request has begun, or never does, and is not complete."""

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _since = 0.0  # when it last began to wait for its client

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since = self.loop.time()
        self._make_room()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self.resume_writing()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:  # closing would wait for the client to read
            self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused in the form of all refusals."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.transport.close()
            return
        self._refuse(400, msg)

    @property
    def _waits(self) -> bool:
        """Whether nothing happens here until the client says more."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _make_room(self) -> None:
        if len(self.connections) <= MOST_CONNECTIONS:
            return
        others = (one for one in self.connections if one is not self)
        waiting = [one for one in others if isinstance(one, TimedProtocol) and one._waits]
        if waiting:
            longest = min(waiting, key=lambda one: one._since)
            self.connections.discard(longest)
            longest.transport.abort()
        else:
            self._refuse(503, "every connection of this server is in use; come again later")

    def _refuse(self, status: int, message: str) -> None:
        body = orjson.dumps(error_body(WireError(status, message)))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting:
            self._forget()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._close)

    def _close(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
