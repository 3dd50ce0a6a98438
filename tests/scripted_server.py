"""A server of OpenAI's API without a model: its answers are a function of the question.

In a test's own loop it is a Scripted, which remembers what it was asked; as a program it takes
its port and the fields of a Scripted as JSON.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from mlxlora.bench.wire import Address

ROLE = {"choices": [{"delta": {"role": "assistant"}, "index": 0}]}


@dataclass
class Scripted:
    salt: str = ""  # changes every answer
    refuses: int = 0  # every so many questions, with 429
    fails: int = 0  # every so many, with 500
    silent_after: int = -1  # questions, after which none is answered
    holds_after: int = -1  # pieces of an answer, after which it waits for release
    waits_for: int = 0  # questions at once, before the first is answered
    cut: int = 7  # bytes of a chunk: events are cut anywhere
    left_over: int = 0  # requests that its metrics count
    sick: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0  # questions being answered
    most: int = 0
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # a client left before the end

    @contextlib.asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[Address]:
        server = await asyncio.start_server(self._client, "127.0.0.1", port)
        async with server:
            yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
            self.release.set()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split("\r\n")[0].split()
            length = next(int(h[15:]) for h in head.split("\r\n") if h.startswith("Content-Length"))
            body = await reader.readexactly(length)
            if method == "GET":
                await self._whole(writer, 503 if self.sick else 200, self._page(path))
            else:
                await self._answer(path, json.loads(body), reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.gone.set()
        finally:
            writer.transport.abort()

    def _page(self, path: str) -> str:
        pages = {
            "/v1/models": json.dumps({"data": [{"id": name} for name in ("base", "a", "b")]}),
            "/metrics": f"# TYPE mlxlora_running gauge\nmlxlora_running {self.left_over}\n",
        }
        return pages.get(path, "{}")

    async def _answer(
        self, path: str, body: dict[str, Any], reader: asyncio.StreamReader, writer: Any
    ) -> None:
        self.asked.append(body)
        number = len(self.asked)
        if self.refuses and number % self.refuses == 0:
            await self._whole(writer, 429, '{"error": {"message": "busy"}}', "Retry-After: 0\r\n")
        elif self.fails and number % self.fails == 0:
            await self._whole(writer, 500, '{"error": {"message": "broken"}}')
        elif 0 <= self.silent_after < number:
            await reader.read()
            self.gone.set()
        else:
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now >= self.waits_for:
                self.enough.set()
            await self.enough.wait()
            try:
                await self._tell(path, body, reader, writer)
            finally:
                self.now -= 1

    async def _tell(
        self, path: str, body: dict[str, Any], reader: asyncio.StreamReader, writer: Any
    ) -> None:
        text = body.get("prompt") or body["messages"][-1]["content"]
        adapter = body.get("adapters") or body["model"]
        count = body["max_tokens"]
        # words beyond ASCII, so that cutting them is noticed
        words = [f"é{crc32(f'{self.salt}{adapter}{text}{n}'.encode()):x} " for n in range(count)]
        usage = {"prompt_tokens": len(text), "completion_tokens": count}
        end = {"finish_reason": "length", "index": 0}
        if not body.get("stream"):
            choice = {"text": "".join(words), **end}
            await self._whole(writer, 200, json.dumps({"choices": [choice], "usage": usage}))
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        await self._event(writer, json.dumps(ROLE))
        await self._chunk(writer, b": still there\n\n")
        for number, word in enumerate(words):
            if number == self.holds_after:
                waits = asyncio.create_task(self.release.wait())
                leaves = asyncio.create_task(reader.read())
                await asyncio.wait([waits, leaves], return_when=asyncio.FIRST_COMPLETED)
                waits.cancel()
                if leaves.done():
                    self.gone.set()
                    return
                leaves.cancel()
            choice = {"delta": {"content": word}} if "chat" in path else {"text": word}
            await self._event(writer, json.dumps({"choices": [choice]}, ensure_ascii=False))
        await self._event(writer, json.dumps({"choices": [end]}))
        await self._event(writer, json.dumps({"choices": [], "usage": usage}))
        await self._event(writer, "[DONE]")
        await self._chunk(writer, b"")

    async def _event(self, writer: asyncio.StreamWriter, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        for start in range(0, len(event), self.cut):
            await self._chunk(writer, event[start : start + self.cut])

    async def _chunk(self, writer: asyncio.StreamWriter, piece: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await writer.drain()

    async def _whole(self, writer: Any, status: int, body: str, header: str = "") -> None:
        content = body.encode()
        head = f"HTTP/1.1 {status} X\r\n{header}Content-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()


async def run(port: int, fields: dict[str, Any]) -> None:
    async with Scripted(**fields).listening(port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]), json.loads(sys.argv[2])))
