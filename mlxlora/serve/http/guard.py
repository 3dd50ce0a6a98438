"""What stands before the application: who may ask, in what form, how much and for how long.

A page of another origin must not use the server through the browser of whoever runs it. So the
Host must be a name of this machine (an address is one, a foreign domain that resolves to it is
not: DNS rebinding), an Origin must be the server's own or allowed, and a body must say that it
is JSON, which no plain form of another page can. Bodies are limited in size and time.
"""

import asyncio
import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from secrets import compare_digest

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
OPEN = ("/", "/health")  # without the key: they tell and do nothing worth guarding
HEADER_BYTES = 32 << 10  # of those that come at once; protocol.py limits those in pieces
SINGLE = (b"authorization", b"origin", b"content-type", b"content-length")  # never given twice
OPEN_UNDER = "/page/"
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}
PATIENCE = 16  # times the largest body that is read, before the connection ends on it
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Rules:
    """hosts and origins beside the machine's own; key "" for none."""

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    key: str = ""
    body_bytes: int = 8 << 20
    body_seconds: float = 20.0  # for all of a body
    send_seconds: float = 60.0  # that a client may leave a piece of the answer unread


@dataclass
class Guard:
    """ASGI middleware. responses counts the status codes of what was answered."""

    app: ASGIApp
    rules: Rules
    responses: Counter[int] = field(default_factory=Counter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a websocket is closed by the server that gets no answer
        headers = _headers(scope)
        origin = headers.get(b"origin", [b""])[0].decode("latin-1")
        allowed = origin if origin in self.rules.origins else ""

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.responses[message["status"]] += 1
                own = [*HEADERS.items(), *_cors(allowed)]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            async with asyncio.timeout(self.rules.send_seconds):
                await send(message)

        try:
            refused = self._refuse(scope, headers, origin)
            if refused is not None:
                await _error(answer, *refused)
            elif scope["method"] == "OPTIONS" and allowed:
                await _plain(answer, 204, b"")
            else:
                body = await self._body(scope, headers, receive)
                await self.app(scope, body, answer)
        except _Refused as refusal:
            await _error(answer, refusal.status, refusal.message)
        except (TimeoutError, _Left):  # nobody reads the answer
            return

    def _refuse(
        self, scope: Scope, headers: Mapping[bytes, list[bytes]], origin: str
    ) -> tuple[int, str] | None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            return 431, f"the headers may have at most {HEADER_BYTES:,} bytes"
        doubled = next((n for n in SINGLE if len(headers.get(n, ())) > 1), None)
        if doubled is not None:
            return 400, f"the header {doubled.decode()} is given twice"
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or not self._own_host(hosts[0].decode("latin-1")):
            return 403, (
                "this Host is not one of this server's names; start it with --allow-host NAME "
                "if it should be"
            )
        own = f"{scope.get('scheme', 'http')}://{hosts[0].decode('latin-1')}"
        if origin and origin != own and origin not in self.rules.origins:
            return 403, (
                "pages of this Origin may not use this server; start it with --allow-origin "
                "ORIGIN if they may"
            )
        path = scope["path"]
        if self.rules.key and not (path in OPEN or path.startswith(OPEN_UNDER)):
            scheme, _, given = headers.get(b"authorization", [b""])[0].partition(b" ")
            theirs = scheme.lower() == b"bearer" and compare_digest(
                given.strip(), self.rules.key.encode()
            )
            if scope["method"] != "OPTIONS" and not theirs:
                return 401, "this server wants its API key: Authorization: Bearer KEY"
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", [b""])[0].partition(b";")[0].strip().lower()
            if kind != b"application/json":
                return 415, "the body must be JSON: Content-Type: application/json"
        return None

    def _own_host(self, host: str) -> bool:
        match = HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]").lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in ("localhost", *self.rules.hosts)
        return True

    async def _body(
        self, scope: Scope, headers: Mapping[bytes, list[bytes]], receive: Receive
    ) -> Receive:
        """The body, read here whole; returns a receive that gives it, then what follows."""
        length = headers.get(b"content-length", [b"0"])[0]
        limit = self.rules.body_bytes
        # Most clients read nothing before all is sent: the rest is read and dropped, if it ends.
        patience = limit if b"expect" in headers else PATIENCE * limit
        too_large = _Refused(413, f"the body may have at most {limit:,} bytes")
        if not length.isdigit() or int(length) > patience:
            raise too_large
        body = bytearray()
        size, more = 0, True
        try:
            async with asyncio.timeout(self.rules.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size <= limit:
                        body += piece
                    elif size > patience:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            if max(size, int(length)) <= limit:
                raise _Refused(408, "the body did not arrive in time") from None
        if max(size, int(length)) > limit:
            raise too_large
        first = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay


def machine_names() -> set[str]:
    """What this machine is called in its own network."""
    name = socket.gethostname().lower()
    return {name, name.partition(".")[0] + ".local"}


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


class _Left(Exception):
    """The client went before its request was whole; half of one is not acted on."""


def _headers(scope: Scope) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.lower(), []).append(value)
    return found


def _cors(allowed: str) -> Iterable[tuple[bytes, bytes]]:
    """Headers that let pages of the allowed origin read the answer."""
    if allowed:
        yield b"access-control-allow-origin", allowed.encode("latin-1")
        yield b"access-control-allow-headers", b"authorization, *"
        yield b"access-control-allow-methods", b"GET, POST"
        yield b"vary", b"origin"


async def _error(send: Send, status: int, message: str) -> None:
    kind = KINDS.get(status, "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    await _plain(send, status, orjson.dumps(body), b"application/json")


async def _plain(send: Send, status: int, body: bytes, kind: bytes = b"text/plain") -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
