"""What is let through to the application, and what is refused before it."""

import asyncio
import json

import httpx
import pytest

from mlxlora.serve.http.guard import Guard, Rules

SEEN = []


async def application(scope, receive, send):
    """Answers with how many bytes it was given."""
    message = await receive()
    SEEN.append(message["body"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(message["body"])).encode()})


@pytest.fixture(autouse=True)
def _nothing_seen():
    SEEN.clear()


def send(method="GET", path="/v1/models", rules=None, host="127.0.0.1:8080", body=None, **headers):
    async def go():
        transport = httpx.ASGITransport(Guard(application, rules or Rules()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as c:
            sent = {"host": host, **{k.replace("_", "-"): v for k, v in headers.items()}}
            return await c.request(method, path, headers=sent, content=body)

    return asyncio.run(go())


def post(body=b"{}", content_type="application/json", **more):
    return send("POST", "/v1/completions", body=body, content_type=content_type, **more)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8080", "localhost:8080", "localhost", "[::1]:8080", "192.168.1.7:8080"]
)
def test_addresses_and_localhost_are_names_of_this_machine(host):
    assert send(host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8080", "a@127.0.0.1", "", "["],
)
def test_another_host_is_refused_against_dns_rebinding(host):
    answer = send(host=host)
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"
    assert not SEEN


def test_a_host_can_be_allowed():
    rules = Rules(hosts=frozenset({"studio.local"}))
    assert send(host="studio.local:8080", rules=rules).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999"])
def test_pages_of_another_origin_are_refused(origin):
    answer = post(origin=origin)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert not SEEN


def test_the_server_s_own_page_may_ask_and_an_allowed_origin_may_read():
    assert post(origin="http://127.0.0.1:8080").status_code == 200
    rules = Rules(origins=frozenset({"http://app.example"}))
    answer = post(rules=rules, origin="http://app.example")
    assert answer.headers["access-control-allow-origin"] == "http://app.example"
    preflight = send("OPTIONS", "/v1/completions", rules, origin="http://app.example")
    assert preflight.status_code == 204
    assert "authorization" in preflight.headers["access-control-allow-headers"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "x"])
def test_a_body_must_say_that_it_is_json(kind):
    assert post(content_type=kind).status_code == 415
    assert not SEEN


def test_json_with_a_charset_is_json():
    assert post(content_type="Application/JSON; charset=utf-8").status_code == 200


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer ", "secret", "Bearer sécret"])
def test_without_the_key_nothing_is_told(given):
    headers = {} if given is None else {"authorization": given.encode("utf-8")}
    answer = send(rules=Rules(key="secret"), **headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"


def test_with_the_key_everything_is_and_the_page_asks_for_it():
    rules = Rules(key="secret")
    assert send(rules=rules, authorization="Bearer secret").status_code == 200
    assert send(rules=rules, authorization="bearer secret").status_code == 200  # RFC 9110, 11.1
    for path in ("/", "/health", "/page/app.js"):
        assert send(path=path, rules=rules).status_code == 200
    assert send(path="/metrics", rules=rules).status_code == 401
    assert send(path="/page/../v1/models", rules=rules).status_code == 401


def test_a_large_body_is_refused_unread():
    rules = Rules(body_bytes=10)
    answer = post(b"x" * 11, rules=rules)
    assert answer.status_code == 413 and answer.headers["connection"] == "close"
    assert post(b"x" * 10, rules=rules).text == "10"
    for length in ("99999999999999", "-1", "1e3"):
        assert post(rules=rules, content_length=length).status_code == 413


def drive(rules, messages, path="/v1/completions", wait=None):
    """Run a request given as ASGI messages; returns the answer's messages."""
    sent = []
    given = iter(messages)
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]

    async def receive():
        message = next(given, None)
        if message is None:
            await asyncio.Event().wait()
        return message

    async def answer(message):
        if wait is not None:
            await wait()
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(Guard(application, rules)(scope, receive, answer))
    return sent


def piece(body, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_without_a_length_is_counted_as_it_comes():
    sent = drive(Rules(body_bytes=10), [piece(b"12345"), piece(b"678901", more=False)])
    assert sent[0]["status"] == 413
    sent = drive(Rules(body_bytes=10), [piece(b"12345"), piece(b"67890", more=False)])
    assert sent[1]["body"] == b"10"


def test_a_body_that_is_far_too_large_is_not_read_to_its_end():
    assert drive(Rules(body_bytes=10), [piece(b"x" * 161)])[0]["status"] == 413
    late = Rules(body_bytes=10, body_seconds=0.01)
    assert drive(late, [piece(b"x" * 11)])[0]["status"] == 413


def test_half_a_body_is_not_passed_on():
    assert drive(Rules(), [piece(b"{}"), {"type": "http.disconnect"}]) == []
    assert not SEEN


def test_a_body_that_never_ends_times_out():
    sent = drive(Rules(body_seconds=0.01), [piece(b"{")])
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["type"] == "invalid_request_error"


def test_a_client_that_reads_nothing_is_let_go():
    sent = drive(Rules(send_seconds=0.01), [piece(b"{}", more=False)], wait=asyncio.Event().wait)
    assert sent == []


def test_answers_cannot_be_framed_sniffed_or_used_elsewhere():
    headers = send(host="evil.example").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("name", [b"authorization", b"origin", b"content-type"])
def test_a_header_that_says_two_things_is_refused(name):
    sent = []
    headers = [(b"host", b"localhost"), (name, b"a"), (name, b"b")]

    async def receive():
        return piece(b"{}", more=False)

    async def answer(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(Guard(application, Rules())(scope, receive, answer))
    assert sent[0]["status"] == 400


def test_headers_that_come_at_once_are_limited_too():
    assert send(x_long="a" * 20_000).status_code == 200
    assert send(x_long="a" * 40_000).status_code == 431
    assert len(SEEN) == 1
