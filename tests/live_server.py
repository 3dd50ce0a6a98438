"""The real application on a real socket, in a thread of the test, and a client without manners.

The model is tiny and random; it knows tools, and three adapters, of two ranks and with DoRA.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
from conftest import CHATML, DENSE, write_model
from serving import adapter_for

from mlxlora.base import load
from mlxlora.serve.engine import Engine, Options
from mlxlora.serve.http.app import application
from mlxlora.serve.http.guard import Guard, Rules
from mlxlora.serve.http.server import listen, server
from mlxlora.serve.http.service import Service
from mlxlora.serve.wire.model import Defaults

SECONDS = 60  # at most, for whatever is waited for
BASE = "tiny"
TOOLS = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- for m in messages -%}{%- for tool_call in m.tool_calls or [] -%}
<tool_call>{{ tool_call.name }}</tool_call>{%- endfor -%}{%- endfor -%}"""
END = 258  # the token that ends an answer


@dataclass
class Live:
    """A server that answers. said: its lines for whoever runs it."""

    engine: Engine
    guard: Guard
    root: Path
    said: list[str]
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, *requests: bytes, **options: Any) -> list["Answer"]:
        """The answers to whole requests, each on a connection of its own, all at once."""
        return asyncio.run(_together([exchange(self.port, one, **options) for one in requests]))

    def post(self, path: str, body: Any) -> "Answer":
        return self.ask(request("POST", path, json.dumps(body).encode()))[0]

    def get(self, path: str) -> "Answer":
        return self.ask(request("GET", path))[0]

    def check_well(self) -> None:
        """Health is green, nothing is left over, and the next plain request is answered."""
        health = self.quiet()
        assert health["status"] == "ok" and health["restarts"] == 0, health
        answer = self.post("/v1/completions", {"model": BASE, "prompt": "hi", "max_tokens": 2})
        assert answer.status == 200 and answer.json["usage"]["prompt_tokens"] == 2

    def quiet(self) -> dict[str, Any]:
        """What /health says once nothing is answered any more."""
        for _ in range(2000):
            health = self.get("/health").json
            if not health["running"] and not health["waiting"]:
                return health
        raise AssertionError(f"still busy: {health}")


@dataclass(frozen=True)
class Answer:
    """What came back: whole, or up to where the client left. status 0: nothing did."""

    status: int = 0
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    complete: bool = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """Raises AssertionError unless it is one of OpenAI's form."""
        (found,) = self.json.items()
        assert found[0] == "error"
        error = found[1]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str) and error["message"].strip()
        assert isinstance(error["type"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        return error

    @property
    def events(self) -> list[Any]:
        """Of a stream that is complete."""
        *lines, last = [line for line in self.body.decode().split("\n\n") if line]
        assert last == "data: [DONE]", self.body[-200:]
        return [json.loads(line[6:]) for line in lines if not line.startswith(":")]

    def header(self, name: str) -> str | None:
        return next((v.decode() for n, v in self.headers if n == name.encode()), None)


def request(
    method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> bytes:
    """The bytes of a request; its connection ends with the answer."""
    own = {"Host": "127.0.0.1", "Connection": "close", "Content-Type": "application/json"}
    lines = {**own, "Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


async def exchange(
    port: int, sent: bytes, *, leave: int | None = None, method: str = "POST"
) -> Answer:
    """Send and read. leave: bytes of the answer, after which the client is gone."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = Reading(method)
    read = 0
    try:
        async with asyncio.timeout(SECONDS):
            writer.write(sent)
            await writer.drain()
            while not answer.over and (leave is None or read < leave):
                piece = await reader.read(1 << 16 if leave is None else leave - read)
                answer.take(piece)
                read += len(piece)
    except ConnectionError:  # answered and closed before all was sent
        pass
    finally:
        writer.transport.abort()
    return answer.answer


class Reading:
    """An answer as it comes in, by h11's rules."""

    def __init__(self, method: str = "POST") -> None:
        self._client = h11.Connection(h11.CLIENT)
        self._client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        self._client.send(h11.EndOfMessage())
        self._body = bytearray()
        self._status, self._headers = 0, ()
        self._complete = False
        self.over = False

    def take(self, data: bytes) -> None:
        """Bytes that came in; none where the connection ended."""
        self._client.receive_data(data)
        try:
            while not self.over:
                event = self._client.next_event()
                if isinstance(event, h11.Response):
                    self._status, self._headers = event.status_code, tuple(event.headers)
                elif isinstance(event, h11.Data):
                    self._body += event.data
                elif event is h11.NEED_DATA:
                    return
                elif not isinstance(event, h11.InformationalResponse):
                    self._complete = isinstance(event, h11.EndOfMessage)
                    self.over = True
        except h11.RemoteProtocolError:  # the end is missing
            self.over = True

    @property
    def answer(self) -> Answer:
        return Answer(self._status, self._headers, bytes(self._body), self._complete)


async def _together(all_of_them: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*all_of_them))


@contextmanager
def live(
    directory: Path, rules: Rules | None = None, options: Options | None = None, **defaults: Any
) -> Iterator[Live]:
    """Serve a tiny model from a directory that does not exist yet."""
    config = {**DENSE, "max_position_embeddings": 2048}
    base = load(write_model(directory / "model", config, TOOLS + CHATML))
    root = directory / "adapters"
    adapter_for(base, 3).save(root / "team" / "third")
    adapters = {"one": adapter_for(base, 1), "two": adapter_for(base, 2, rank=8)}
    adapters["dora"] = adapter_for(base, 4, method="dora")
    with Engine(base, adapters, options) as engine:
        said: list[str] = []
        service = Service(engine, BASE, Defaults(**defaults), root, said.append)
        guard = application(service, rules or Rules())
        listener = listen("127.0.0.1", 0)
        found = Live(engine, guard, root, said, listener.getsockname()[1])
        ready = threading.Event()
        running = server(guard, ready.set)
        thread = threading.Thread(target=running.run, args=([listener],), name="server")
        thread.start()
        try:
            assert ready.wait(SECONDS)
            yield found
        finally:
            running.should_exit = True
            thread.join(SECONDS)
            listener.close()
            assert not thread.is_alive()
