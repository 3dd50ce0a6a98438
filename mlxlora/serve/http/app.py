"""The server's paths: requests in, the engine asked, answers out.

What a request says is read in requests.py and prompts.py, what is answered is written in
answers.py; here they meet. Nothing here names a file, a repository or an address that a client
has sent, but for adapters below the root that the server was given (library.py).
"""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mlxlora.errors import AdapterError, MlxLoraError
from mlxlora.serve.http.answering import (
    Failed,
    Gone,
)
from mlxlora.serve.http.guard import Guard, Rules
from mlxlora.serve.http.library import check_name, load_from
from mlxlora.serve.http.metrics import CONTENT_TYPE, metrics
from mlxlora.serve.http.refusing import as_wire
from mlxlora.serve.http.replying import Asked, as_json, reply
from mlxlora.serve.http.service import Service, no_model
from mlxlora.serve.orders import Busy, Unknown
from mlxlora.serve.wire import chat_answers, prompts, text_answers
from mlxlora.serve.wire.answers import head
from mlxlora.serve.wire.reading import read_object
from mlxlora.serve.wire.refusals import WireError, bad_field, error_body
from mlxlora.serve.wire.requests import ChatRequest, CompletionRequest, parse
from mlxlora.serve.wire.speech import Speech
from mlxlora.serve.wire.strict import Strict

PAGE = Path(__file__).parent.parent / "page"
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
PAGE_HEADERS = {"content-security-policy": CONTENT_POLICY, "cache-control": "no-cache"}


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
    await service.check(made)
    spelling = service.spelling if asked.logprobs else None
    tokenizer = service.engine.base.tokenizer
    choices = [
        chat_answers.ChatChoice(
            number, Speech(tokenizer, made.manner, service.calls.read), spelling
        )
        for number in range(len(made.orders))
    ]
    chat = Asked(
        head("chatcmpl", asked.model, service.fingerprint),
        made.orders,
        choices,
        [0] * len(choices),
        chat_answers.chat_chunk,
        chat_answers.chat_completion,
        asked.stream,
        asked.include_usage,
        bool(made.manner.tools) and service.calls.slow,
    )
    return await reply(service, chat, request.receive)


async def _completion(request: Request) -> Response:
    service = _service(request)
    asked = await service.read(partial(parse, await request.body(), CompletionRequest))
    adapter = service.adapter(asked.model)
    reading, parts = prompts.continuations(asked, service.model, adapter), []
    while part := await service.read(partial(next, reading, None)):
        parts.append(part)
    made = prompts.joined(parts)
    spelling = service.spelling if asked.logprobs is not None else None
    choices = [
        text_answers.TextChoice(number, echo, spelling) for number, echo in enumerate(made.echoes)
    ]
    completion = Asked(
        head("cmpl", asked.model, service.fingerprint),
        made.orders,
        choices,
        made.prompts,
        text_answers.completion_chunk,
        text_answers.completion,
        asked.stream,
        asked.include_usage,
    )
    return await reply(service, completion, request.receive)


async def _models(request: Request) -> Response:
    return as_json({"object": "list", "data": _service(request).models()})


async def _model(request: Request) -> Response:
    wanted = request.path_params["id"]
    for model in _service(request).models():
        if model["id"] == wanted:
            return as_json(model)
    raise no_model(wanted)


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
    return as_json({"status": "ok", "lora_name": name})


async def _unload(request: Request) -> Response:
    service = _service(request)
    _root(service)
    asked = UnloadAdapter.read(read_object(await request.body()))
    try:
        await asyncio.to_thread(service.engine.unload, asked.lora_name)
    except Unknown as error:
        raise no_model(asked.lora_name) from error
    service.say(f"{asked.lora_name} unloaded")
    return as_json({"status": "ok", "lora_name": asked.lora_name})


async def _health(request: Request) -> Response:
    health = _service(request).engine.health()
    return as_json(health, 200 if health["status"] == "ok" else 503)


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


async def _refused(request: Request, error: Exception) -> Response:
    wire = as_wire(error)
    headers = {"retry-after": str(error.seconds)} if isinstance(error, Busy) else None
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
    return as_json(error_body(wire), wire.status, headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; it is counted
