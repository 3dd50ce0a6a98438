"""Real sockets that say their request slowly, or not at all."""

import asyncio

import pytest
import uvicorn

from mlxlora.serve.http import protocol
from mlxlora.serve.http.protocol import TimedProtocol

ANSWER = b"HTTP/1.1 200 OK"


async def application(scope, receive, send):
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


def talk(script):
    """Run script(reader, writer) against a server on a free port."""

    async def go():
        config = uvicorn.Config(
            application, port=0, http=TimedProtocol, lifespan="off", log_level="critical"
        )
        server = uvicorn.Server(config)
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.wait_for(script(reader, writer), 20)
        finally:
            writer.close()
            server.should_exit = True
            await task

    asyncio.run(go())


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.05)


REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("beginning", [b"", b"GET / HTTP/1.1\r\n", REQUEST[:-2]])
def test_a_request_that_is_not_completed_is_not_waited_for(hasty, beginning):
    async def script(reader, writer):
        writer.write(beginning)
        assert await reader.read() == b""

    talk(script)


def test_a_header_a_minute_does_not_help(hasty):
    async def script(reader, writer):
        writer.write(b"GET / HTTP/1.1\r\n")
        with pytest.raises((ConnectionError, AssertionError)):
            while True:
                writer.write(b"X-A: b\r\n")
                await writer.drain()
                assert not reader.at_eof()
                await asyncio.sleep(0.01)

    talk(script)


def test_the_next_request_of_a_connection_is_timed_too(hasty):
    async def script(reader, writer):
        writer.write(REQUEST)
        assert (await reader.readuntil(b"ok")).startswith(ANSWER)
        writer.write(b"GET / HT")
        assert await reader.read() == b""

    talk(script)


def test_whole_requests_are_answered_one_after_another():
    async def script(reader, writer):
        for _ in range(3):
            writer.write(REQUEST)
            assert (await reader.readuntil(b"ok")).startswith(ANSWER)

    talk(script)


@pytest.mark.parametrize("request_", [b"\x16\x03\x01\x02\x00", b"GET /\r\n\r\n", b"A" * 100_000])
def test_what_is_no_http_is_answered_as_such(request_):
    async def script(reader, writer):
        writer.write(request_)
        writer.write(b"\r\n\r\n")
        assert b"400" in (await reader.read()).partition(b"\r\n")[0]

    talk(script)
