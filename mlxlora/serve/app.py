"""The server's paths: requests in, the engine asked, answers out.

What a request says is read in requests.py and prompts.py, what is answered is written in
answers.py; here they meet. Nothing here names a file, a repository or an address that a client
has sent, but for adapters below the root that the server was given (library.py).
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson
from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mlxlora.errors import AdapterError, DataError, MlxLoraError
from mlxlora.serve import chat_answers, prompts, text_answers
from mlxlora.serve.abilities import capabilities
from mlxlora.serve.answering import (
    QUIET_SECONDS,
    EventStream,
    Failed,
    Gone,
    Running,
    while_connected,
)
from mlxlora.serve.answers import Head, head, usage
from mlxlora.serve.engine import Engine
from mlxlora.serve.guard import KINDS, Guard, Rules
from mlxlora.serve.library import check_name, load_from
from mlxlora.serve.metrics import CONTENT_TYPE, metrics
from mlxlora.serve.orders import Busy, End, Order, Piece, Unknown
from mlxlora.serve.reading import read_object
from mlxlora.serve.refusals import WireError, bad_field, error_body, of_fault
from mlxlora.serve.requests import ChatRequest, CompletionRequest, parse
from mlxlora.serve.speech import Speech
from mlxlora.serve.spelling import Spelling
from mlxlora.serve.strict import Strict

PAGE = Path(__file__).parent / "page"
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
PAGE_HEADERS = {"content-security-policy": CONTENT_POLICY, "cache-control": "no-cache"}
SERVER_ERROR = "server_error"
T = TypeVar("T")
Json = dict[str, Any]


class LoadAdapter(Strict):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)


class UnloadAdapter(Strict):
    lora_name: str = Field(min_length=1)


class _Files(StaticFiles):
    """The page's files, asked for anew whenever they have changed."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(PAGE_HEADERS)
        return response


class Choice(Protocol):
    """A choice of either kind of answer: what it tells of the events that it is given."""

    def first(self) -> Json | None: ...
    def piece(self, piece: Piece) -> Json | None: ...
    def end(self, end: End) -> list[Json]: ...


@dataclass
class Service:
    """What requests are answered with. name: the base's, in requests."""

    engine: Engine
    name: str
    defaults: prompts.Defaults = field(default_factory=prompts.Defaults)
    adapter_root: Path | None = None
    say: Callable[[str], None] = lambda line: None  # a line for whoever runs the server
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        tokenizer = self.engine.base.tokenizer
        self.model = prompts.Model(
            tokenizer, self.engine.context, self.engine.grammars, self.defaults
        )
        self.spelling = Spelling(tokenizer)
        self.capabilities = capabilities(tokenizer)
        self.fingerprint = f"mlxlora-{self.engine.base.identity.fingerprint[:12]}"
        # One thread for templates and tokenizers, which are not made to be used by several.
        self._reader = ThreadPoolExecutor(1, "reader")

    async def read(self, what: Callable[[], T]) -> T:
        """Have what may take its time done beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, what)

    def adapter(self, model: str) -> str | None:
        """The adapter that a request means. Raises WireError (404)."""
        if model == self.name:
            return None
        if model in self.engine.names:
            return model
        raise _no_model(model)

    def models(self) -> list[Json]:
        base = {
            "object": "model",
            "created": self.created,
            "owned_by": "mlxlora",
            "root": self.name,
            "max_model_len": self.engine.context,
            "capabilities": self.capabilities,
        }
        adapters = sorted(self.engine.names.items())
        return [
            {"id": self.name, **base, "parent": None},
            *(
                {"id": name, **base, "created": int(served.since), "parent": self.name}
                for name, served in adapters
            ),
        ]


def application(service: Service, rules: Rules) -> Guard:
    """The ASGI application, guarded."""
    routes = [
        Route("/", _page),
        Mount("/page", _Files(directory=PAGE)),
        Route("/health", _health),
        Route("/metrics", _metrics),
        Route("/v1/models", _models),
        Route("/v1/models/{id:path}", _model),
        Route("/v1/chat/completions", _chat, methods=["POST"]),
        Route("/v1/completions", _completion, methods=["POST"]),
        Route("/v1/load_lora_adapter", _load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", _unload, methods=["POST"]),
    ]
    handlers = {
        MlxLoraError: _refused,
        HTTPException: _refused,
        Failed: _refused,
        Gone: _gone,
        Exception: _refused,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.service = service
    guard = Guard(app, rules)
    app.state.responses = guard.responses
    return guard


async def _chat(request: Request) -> Response:
    service = _service(request)
    asked = await service.read(partial(parse, await request.body(), ChatRequest))
    adapter = service.adapter(asked.model)
    made = await service.read(partial(prompts.chat, asked, service.model, adapter))
    spelling = service.spelling if asked.logprobs else None
    tokenizer = service.engine.base.tokenizer
    choices = [
        chat_answers.ChatChoice(number, Speech(tokenizer, made.manner), spelling)
        for number in range(len(made.orders))
    ]
    return await _answered(
        request,
        _Answer(
            head("chatcmpl", asked.model, service.fingerprint),
            made.orders,
            choices,
            [0] * len(choices),
            chat_answers.chat_chunk,
            chat_answers.chat_completion,
        ),
        asked.stream,
        asked.include_usage,
    )


async def _completion(request: Request) -> Response:
    service = _service(request)
    asked = await service.read(partial(parse, await request.body(), CompletionRequest))
    adapter = service.adapter(asked.model)
    made = await service.read(partial(prompts.completion, asked, service.model, adapter))
    spelling = service.spelling if asked.logprobs is not None else None
    choices = [
        text_answers.TextChoice(number, echo, spelling) for number, echo in enumerate(made.echoes)
    ]
    return await _answered(
        request,
        _Answer(
            head("cmpl", asked.model, service.fingerprint),
            made.orders,
            choices,
            made.prompts,
            text_answers.completion_chunk,
            text_answers.completion,
        ),
        asked.stream,
        asked.include_usage,
    )


@dataclass(frozen=True)
class _Answer:
    """An answer in the making. prompts: of each choice, the number of its prompt."""

    head: Head
    orders: Sequence[Order]
    choices: Sequence[Any]
    prompts: Sequence[int]
    chunk: Callable[..., Json]
    whole: Callable[..., Json]


async def _answered(request: Request, answer: _Answer, stream: bool, tell_usage: bool) -> Response:
    service = _service(request)
    running = await _submitted(service, answer.orders)
    if stream:
        return EventStream(_chunks(service, running, answer, tell_usage), _error_in_stream)
    return await while_connected(request.receive, _whole(service, running, answer))


async def _submitted(service: Service, orders: Sequence[Order]) -> Running:
    submit = partial(Running, service.engine, orders, asyncio.get_running_loop())
    if any(order.grammar is not None for order in orders):  # which takes a while to compile
        return await service.read(submit)
    return submit()


async def _whole(service: Service, running: Running, answer: _Answer) -> Response:
    told = _Told(service, answer)
    try:
        async with aclosing(running.events()) as coming:
            async for events in coming:
                for number, event in events:
                    told.take(number, event)
    finally:
        running.cancel()
        told.report()
    return _json(answer.whole(answer.head, answer.choices, told.usage))


async def _chunks(
    service: Service, running: Running, answer: _Answer, tell_usage: bool
) -> AsyncIterator[list[Json]]:
    told = _Told(service, answer)
    chunk = partial(answer.chunk, answer.head)
    try:
        first = [choice.first() for choice in answer.choices]
        if any(first):
            yield [chunk([one]) for one in first if one is not None]
        async with aclosing(running.events(QUIET_SECONDS)) as coming:
            async for events in coming:
                new = [one for number, event in events for one in told.take(number, event)]
                if new or not events:
                    yield [chunk([one]) for one in new]
        if tell_usage:
            yield [chunk([], told.usage)]
    finally:
        running.cancel()
        told.report()


class _Told:
    """What the choices of one answer have told, and how they ended."""

    def __init__(self, service: Service, answer: _Answer) -> None:
        self._service, self._answer = service, answer
        self._ends: list[tuple[int, End]] = []
        self._began = time.monotonic()

    def take(self, number: int, event: Any) -> list[Json]:
        """The choices of the chunks that follow from an event."""
        choice: Choice = self._answer.choices[number]
        if isinstance(event, End):
            self._ends.append((self._answer.prompts[number], event))
            return choice.end(event)
        new = choice.piece(event)
        return [] if new is None else [new]

    @property
    def usage(self) -> Json:
        return usage(self._ends)

    def report(self) -> None:
        """A line for whoever runs the server."""
        if len(self._ends) < len(self._answer.choices):
            self._service.say(f"{self._answer.head.model}  not completed")
            return
        total, seconds = self.usage, time.monotonic() - self._began
        cached = total["prompt_tokens_details"]["cached_tokens"]
        known = f" ({cached:,} kept)" if cached else ""
        self._service.say(
            f"{self._answer.head.model}  {total['prompt_tokens']:,} tokens{known} -> "
            f"{total['completion_tokens']:,} in {seconds:.1f} s"
        )


async def _models(request: Request) -> Response:
    return _json({"object": "list", "data": _service(request).models()})


async def _model(request: Request) -> Response:
    wanted = request.path_params["id"]
    for model in _service(request).models():
        if model["id"] == wanted:
            return _json(model)
    raise _no_model(wanted)


async def _load(request: Request) -> Response:
    service = _service(request)
    root = _root(service)
    asked = LoadAdapter.read(read_object(await request.body()))
    name = asked.lora_name
    try:
        check_name(name)
    except AdapterError as error:
        raise bad_field("lora_name", str(error)) from error
    if name == service.name or name in service.engine.names:
        raise bad_field("lora_name", f"{name} is loaded already; unload it first")
    try:
        await asyncio.to_thread(lambda: service.engine.load(name, load_from(root, asked.lora_path)))
    except MlxLoraError as error:
        raise bad_field("lora_path", str(error)) from error
    service.say(f"{name} loaded")
    return _json({"status": "ok", "lora_name": name})


async def _unload(request: Request) -> Response:
    service = _service(request)
    _root(service)
    asked = UnloadAdapter.read(read_object(await request.body()))
    try:
        await asyncio.to_thread(service.engine.unload, asked.lora_name)
    except Unknown as error:
        raise _no_model(asked.lora_name) from error
    service.say(f"{asked.lora_name} unloaded")
    return _json({"status": "ok", "lora_name": asked.lora_name})


async def _health(request: Request) -> Response:
    health = _service(request).engine.health()
    return _json(health, 200 if health["status"] == "ok" else 503)


async def _metrics(request: Request) -> Response:
    text = metrics(_service(request).engine, request.app.state.responses)
    return Response(text, headers={"content-type": CONTENT_TYPE})


async def _page(request: Request) -> Response:
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _root(service: Service) -> Path:
    if service.adapter_root is None:
        raise WireError(
            404, "adapters are neither loaded nor unloaded here: start with --adapter-root DIR"
        )
    return service.adapter_root


def _no_model(name: str) -> WireError:
    return WireError(
        404,
        f"there is no model {name[:100]!r} here; GET /v1/models lists them",
        param="model",
        code="model_not_found",
    )


def _json(value: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


async def _refused(request: Request, error: Exception) -> Response:
    wire = _as_wire(error)
    headers = {"retry-after": str(error.seconds)} if isinstance(error, Busy) else None
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
    return _json(error_body(wire), wire.status, headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; it is counted


def _error_in_stream(error: Exception) -> Json:
    return error_body(_as_wire(error))


def _as_wire(error: Exception) -> WireError:
    if isinstance(error, WireError):
        return error
    if isinstance(error, Failed):
        return of_fault(error.fault)
    if isinstance(error, Busy):
        return WireError(429, f"{error}; come again later", KINDS[429], code="rate_limit_exceeded")
    if isinstance(error, Unknown):  # unloaded while it was being asked
        return WireError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, DataError):
        return bad_field(None, str(error))
    if isinstance(error, HTTPException):
        said = {404: "there is nothing at this path", 405: "this path has no such method"}
        return WireError(error.status_code, said.get(error.status_code, str(error.detail)))
    logging.getLogger(__name__).error("a request failed", exc_info=error)
    return WireError(500, f"a fault of this server ({type(error).__name__})", SERVER_ERROR)
