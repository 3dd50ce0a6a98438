"""The server that the chat page talks to, with answers by script: no model, no engine.

It serves the page under the policy that it has to live with, and speaks OpenAI's wire format. What
it answers depends on the last thing said; a Gate in an answer waits until the test opens it.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mlxlora.serve.http.app import CONTENT_POLICY, PAGE

BASE = "lab/Qwen3-0.6B-4bit"
SECONDS = 30  # at most for what is waited for


@dataclass(frozen=True)
class Thought:
    """A piece of reasoning."""

    text: str


@dataclass(frozen=True)
class Refusal:
    """In place of an answer."""

    status: int
    message: str = "no"
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Breakdown:
    """A fault in mid-stream, said as the server says it."""

    message: str


class Cut:
    """The connection ends in mid-stream, and nothing is said."""


class Gate:
    """What follows is sent once the test opens it; reached tells that all before was sent."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open = asyncio.Event()
        self.reached = threading.Event()
        self.left = threading.Event()  # the client went away while it was closed

    async def wait(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.reached.set()
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.left.set()
            raise

    def open(self) -> None:
        assert self.reached.wait(SECONDS) and self._loop
        self._loop.call_soon_threadsafe(self._open.set)


Step = str | Thought | Refusal | Breakdown | Cut | Gate


def model(name: str, parent: str | None = BASE, capabilities: tuple[str, ...] = ("chat",)):
    return {
        **{"id": name, "object": "model", "created": 1, "owned_by": "mlxlora", "parent": parent},
        **{"root": BASE, "max_model_len": 32768, "capabilities": ["completions", *capabilities]},
    }


@dataclass
class Script:
    """What the server does, and what it was asked. answers: the last thing said, or a model's
    name and it (("terse", "hello")), to the steps of the answer."""

    url: str = ""
    key: str = ""
    models: list[dict[str, Any]] = field(
        default_factory=lambda: [model(BASE, None), model("terse"), model("poet")]
    )
    answers: dict[str | tuple[str, str], list[Step]] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def steps(self, body: dict[str, Any]) -> list[Step]:
        said = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        name = body["model"].split("/")[-1]
        usual = [f"{name} heard: ", *said.split(" ")]
        return self.answers.get((name, said), self.answers.get(said, usual))


def application(script: Script) -> Starlette:
    def allowed(request: Request) -> bool:
        return not script.key or request.headers.get("authorization") == f"Bearer {script.key}"

    def error(refusal: Refusal) -> Response:
        said = {"message": refusal.message, "type": "error", "param": None, "code": refusal.code}
        return JSONResponse({"error": said}, refusal.status, dict(refusal.headers))

    async def page(_: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def models(request: Request) -> Response:
        if not allowed(request):
            return error(Refusal(401, "this server wants its API key"))
        return JSONResponse({"object": "list", "data": script.models})

    async def answer(request: Request) -> Response:
        if not allowed(request):
            return error(Refusal(401, "this server wants its API key"))
        body = await request.json()
        script.asked.append(body)
        script.paths.append(request.url.path)
        steps = script.steps(body)
        if steps and isinstance(steps[0], Refusal):
            return error(steps[0])
        stream = chunks(steps, chat="messages" in body)
        return StreamingResponse(stream, media_type="text/event-stream")

    routes = [
        Route("/", page),
        Route("/v1/models", models),
        Route("/v1/chat/completions", answer, methods=["POST"]),
        Route("/v1/completions", answer, methods=["POST"]),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]

    async def guarded(scope, receive, send) -> None:
        async def with_policy(message) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    *message["headers"],
                    (b"content-security-policy", CONTENT_POLICY.encode()),
                ]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, with_policy)

    app = Starlette(routes=routes)
    return guarded


async def chunks(steps: list[Step], *, chat: bool) -> AsyncIterator[str]:
    count = 0
    if chat:
        yield event({"delta": {"role": "assistant", "content": ""}})
    for step in steps:
        if isinstance(step, Gate):
            await step.wait()
        elif isinstance(step, Cut):
            return
        elif isinstance(step, Breakdown):
            yield f"data: {json.dumps({'error': {'message': step.message}})}\n\ndata: [DONE]\n\n"
            return
        else:
            count += 1
            thought = {"reasoning": step.text} if isinstance(step, Thought) else {"content": step}
            if isinstance(step, Thought):
                thought["reasoning_content"] = step.text
            yield event({"delta": thought} if chat else {"text": step})
    yield event({"delta": {}, "finish_reason": "stop"} if chat else {"finish_reason": "stop"})
    usage = {"prompt_tokens": 12, "completion_tokens": count, "total_tokens": 12 + count}
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


def event(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': None, **choice}]})}\n\n"


@contextmanager
def serving(script: Script) -> Iterator[None]:
    """The scripted server; script.url says where."""
    with on_a_port(application(script)) as script.url:
        yield


@contextmanager
def on_a_port(app: Any) -> Iterator[str]:
    """An application on a port of its own, in a thread: its address."""
    config = uvicorn.Config(
        app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    limit = time.monotonic() + SECONDS
    while not server.started:
        assert thread.is_alive() and time.monotonic() < limit
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(SECONDS)
