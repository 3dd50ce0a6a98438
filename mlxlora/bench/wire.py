"""One request on a connection of its own, and its answer as it comes: HTTP/1.1 and its events.

Written on asyncio's streams, so that a client can vanish at any moment as real ones do, and so
that measuring needs no library that the program itself does not. Left out: redirects, TLS,
compression, connections that are used again (mlx_lm.server closes its own after each answer).
HTTP: RFC 9112; events: the HTML standard, section 9.2.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

AT_ONCE = 1 << 16  # bytes read at most
_CUT_OFF = (asyncio.IncompleteReadError, asyncio.LimitOverrunError)


class BrokenAnswer(Exception):
    """What came is no HTTP, or ended before it was complete."""


@dataclass(frozen=True)
class Address:
    host: str
    port: int


@dataclass
class Reply:
    """An answer whose head has come; its body comes by pieces()."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    _reader: asyncio.StreamReader = field(repr=False)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body in the pieces in which it comes. Raises BrokenAnswer if it is cut off."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            async for piece in self._chunks():
                yield piece
            return
        told = self.headers.get("content-length")
        left = int(told) if told is not None else None
        while left is None or left > 0:
            piece = await self._reader.read(AT_ONCE if left is None else min(left, AT_ONCE))
            if not piece:
                if left:
                    raise BrokenAnswer(f"the answer ended {left} bytes before its end")
                return
            left = left and left - len(piece)
            yield piece

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            while size := int((await self._reader.readuntil(b"\n")).split(b";")[0], 16):
                yield await self._reader.readexactly(size)
                await self._reader.readuntil(b"\n")
            while (await self._reader.readuntil(b"\n")).strip():
                pass  # trailers
        except (*_CUT_OFF, ValueError) as error:
            raise BrokenAnswer("the answer ended in the middle of a stream") from error


class Connection:
    """async with Connection(address) as one: await one.send(...); reply = await one.reply()."""

    def __init__(self, address: Address) -> None:
        self._address = address

    async def __aenter__(self) -> "Connection":
        self._reader, self._writer = await asyncio.open_connection(
            self._address.host, self._address.port
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closed at once, whatever was still to come: this is how a client vanishes."""
        self._writer.transport.abort()
        # one turn of the loop, in which the socket is closed
        await asyncio.sleep(0)

    async def send(self, method: str, path: str, body: Any = None, part: float = 1.0) -> None:
        """part: of the request's bytes, only so many from the beginning."""
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._address.host}:{self._address.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
            "Connection: close\r\n\r\n"
        )
        request = head.encode() + content
        self._writer.write(request[: round(part * len(request))])
        await self._writer.drain()

    async def reply(self) -> Reply:
        """Wait for the head of the answer."""
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.strip().split("\r\n")
            named = (line.partition(":") for line in lines)
            headers = {name.strip().lower(): value.strip() for name, _, value in named}
            return Reply(int(first.split()[1]), headers, self._reader)
        except (*_CUT_OFF, ValueError, IndexError) as error:
            raise BrokenAnswer("the connection was closed without an answer") from error


async def get(address: Address, path: str) -> tuple[int, bytes]:
    """(status, body). Raises OSError if nobody listens, BrokenAnswer."""
    async with Connection(address) as connection:
        await connection.send("GET", path)
        reply = await connection.reply()
        return reply.status, await reply.body()


class Events:
    """Server-sent events from bytes that are cut anywhere: feed() returns what became complete."""

    def __init__(self) -> None:
        self._rest = b""  # of a line
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of events; comments and other fields say nothing here."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        found = []
        for line in (line.removesuffix(b"\r") for line in lines):
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data).decode())
                self._data = []
        return found
