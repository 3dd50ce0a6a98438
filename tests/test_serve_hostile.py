"""Whatever a client sends, the server goes on: the real application, over real sockets."""

import asyncio
import json
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from live_server import BASE, END, SECONDS, Answer, Reading, exchange, live, request

from mlxlora.serve.engine import Options
from mlxlora.serve.http import protocol
from mlxlora.serve.http.server import allow_connections
from mlxlora.serve.wire import chat_answers

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
ON = {str(END): -100}  # the answer does not end by itself
PATHS = [
    *("/", "/health", "/metrics", "/v1/models", f"/v1/models/{BASE}", "/page/", CHAT, TEXT),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/nothing", "/page/nothing.js"),
]
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    where = tmp_path_factory.mktemp("hostile") / "served"
    with live(where, options=Options(rows=8, waiting=64), max_tokens=8) as found:
        yield found


@pytest.fixture(autouse=True)
def _well_afterwards(server):
    yield
    server.check_well()


def text(**fields):
    return {"model": BASE, "prompt": "hello", "max_tokens": 4, **fields}


def chat(**fields):
    return {"model": BASE, "messages": HI, "max_tokens": 4, **fields}


# What ends generation for everybody in other servers


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 100_000},
        {"top_k": 2**62, "temperature": 1},
        {"prompt": ["a", "b"]},
        {"prompt": [[1, 2], [3]], "n": 2, "temperature": 1},
        {"stop": ["x", "yy"]},
        {"seed": 2**64 - 1, "temperature": 2, "top_p": 1e-9},
        {"logit_bias": {"0": 100, str(END): -100}},
        {"min_p": 1, "temperature": 1},
        {"repetition_penalty": 1e-300},
        {"max_tokens": 2**62, "stop": "\ufffd"},
    ],
)
def test_these_are_answered(server, fields):
    answer = server.post(TEXT, text(**fields))
    assert answer.status == 200, answer.body
    prompts = fields.get("prompt", "x")
    count = fields.get("n", 1) * (len(prompts) if isinstance(prompts, list) else 1)
    assert len(answer.json["choices"]) == count


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [259]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"prompt": ["x"] * 200}, "prompt"),
        ({"stop": [3]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 2000}, "stop"),
        ({"xtc_threshold": 0.9}, "xtc_threshold"),
        ({"logit_bias": {"259": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1e9}}, "logit_bias"),
        ({"temperature": -1}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"top_k": -1}, "top_k"),
        ({"n": 10**6}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"logprobs": 1000}, "logprobs"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_these_are_refused_by_name(server, fields, param):
    answer = server.post(TEXT, text(**fields))
    assert (answer.status, answer.error["param"]) == (400, param)


@pytest.mark.parametrize("model", ["/etc/passwd", "../x", "mlx-community/x", "", "\0", "x" * 9999])
def test_a_model_is_never_a_path_that_a_client_names(server, model):
    for path, body in ((TEXT, text(model=model)), (CHAT, chat(model=model))):
        answer = server.post(path, body)
        assert answer.status == (404 if model else 400)
        assert answer.error["param"] == "model" and len(answer.error["message"]) < 500


@pytest.mark.parametrize("model", [BASE, "one", "dora"])
def test_a_prompt_may_be_an_earlier_one_and_its_answer(server, model):
    fields = {"model": model, "logit_bias": ON, "prompt": [104, 105], "logprobs": 0}
    first = server.post(TEXT, text(**fields)).json
    tokens = [104, 105, *range(8)]
    for prompt in ("hello" + first["choices"][0]["text"], tokens, tokens, tokens[:-1]):
        assert server.post(TEXT, text(**{**fields, "prompt": prompt})).status == 200


def test_another_adapter_does_not_wait_for_the_batch(server):
    async def go():
        body = text(max_tokens=1500, logit_bias=ON)
        slow = request("POST", TEXT, json.dumps(body).encode())
        long = asyncio.ensure_future(exchange(server.port, slow))
        while not server.engine.health()["running"]:
            await exchange(server.port, request("GET", "/health"))
        for model in ("one", "two", "dora", BASE):
            quick = request("POST", TEXT, json.dumps(text(model=model)).encode())
            assert (await exchange(server.port, quick)).status == 200
            assert not long.done()
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)

    asyncio.run(go())


def test_every_stop_that_occurs_in_the_text_ends_it(server):
    whole = server.post(TEXT, text(max_tokens=40, logit_bias=ON)).json["choices"][0]["text"]
    stops = {whole[i : i + n] for n in (1, 2, 3) for i in range(0, 30, 5)}
    for stop in sorted(stops):
        answer = server.post(TEXT, text(max_tokens=40, logit_bias=ON, stop=stop)).json
        (choice,) = answer["choices"]
        assert choice["text"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_more_is_generated_for_who_went_away(server, stream):
    tokens, gone = server.engine.vitals.counters.tokens, server.engine.vitals.counters.cancelled
    sent = json.dumps(text(max_tokens=1900, logit_bias=ON, stream=stream)).encode()

    async def go():
        asked = asyncio.ensure_future(exchange(server.port, request("POST", TEXT, sent)))
        while not server.engine.health()["running"]:
            await exchange(server.port, request("GET", "/health"))
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(go())
    assert server.quiet()["status"] == "ok"
    assert server.engine.vitals.counters.cancelled == gone + 1
    assert server.engine.vitals.counters.tokens < tokens + 1900


def test_others_are_answered_while_schemas_are_checked(server, monkeypatch):
    begun, asked, check = threading.Event(), threading.Event(), server.engine.grammars.check

    def slowly(grammar):
        begun.set()
        assert asked.wait(SECONDS)
        check(grammar)

    monkeypatch.setattr(server.engine.grammars, "check", slowly)
    held = chat(response_format={"type": "json_object"})
    with ThreadPoolExecutor(2) as others:
        answers = [others.submit(server.post, CHAT, held) for _ in range(2)]
        assert begun.wait(SECONDS)
        assert [server.post(CHAT, chat()).status for _ in range(2)] == [200] * 2
        asked.set()
        assert [answer.result().status for answer in answers] == [200] * 2


def test_others_are_read_between_two_prompts_of_a_request(server, monkeypatch):
    """A hundred long ones take seconds to cut into tokens."""
    cut, encode = [], server.engine.base.tokenizer._tokenizer._encode_plus
    begun, asked = threading.Event(), threading.Event()

    def watched(*given, **how):
        cut.append(given[0] if given else how["text"])
        if cut == ["first"]:
            begun.set()
            assert asked.wait(SECONDS)
        return encode(*given, **how)

    monkeypatch.setattr(server.engine.base.tokenizer._tokenizer, "_encode_plus", watched)
    with ThreadPoolExecutor(2) as others:
        one = others.submit(server.post, TEXT, text(prompt=["first", "second", "third"]))
        assert begun.wait(SECONDS)
        other = others.submit(server.post, TEXT, text(prompt="other"))
        while server.guard.app.state.service._read._worker.jobs.empty():
            time.sleep(0.01)  # until it waits, perhaps to be parsed
        asked.set()
        assert one.result().status == other.result().status == 200
    assert cut.index("other") < cut.index("third")


def test_others_are_answered_while_a_long_answer_is_written(server, monkeypatch):
    """As one with the log-probabilities of many tokens is, for seconds."""
    begun, asked, write = threading.Event(), threading.Event(), chat_answers.chat_completion

    def written(*given):
        begun.set()
        assert asked.wait(SECONDS)
        return write(*given)

    monkeypatch.setattr(chat_answers, "chat_completion", written)
    with ThreadPoolExecutor(1) as others:
        answer = others.submit(server.post, CHAT, chat(logprobs=True, top_logprobs=20))
        assert begun.wait(SECONDS)
        assert server.post(TEXT, text()).status == 200
        asked.set()
        assert answer.result().status == 200


def test_what_is_far_too_long_is_refused_before_it_is_read(server, monkeypatch):
    """Cutting so much into tokens would take a minute, and others wait for the tokenizer."""
    tokenizer = server.engine.base.tokenizer
    monkeypatch.setattr(tokenizer._tokenizer, "_encode_plus", None)  # nothing may be cut
    many = {f"k{n}": {"description": "x" * 1000} for n in range(6000)}
    function = {"name": "f", "parameters": {"properties": many}}
    called = {"type": "function", "function": {"name": "f", "arguments": json.dumps(many)}}
    for path, body, param in (
        (TEXT, text(prompt="a b " * (1 << 20)), "prompt"),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 2000}] * 3000), "messages"),
        (CHAT, chat(messages=[{"role": "assistant", "tool_calls": [called]}]), "messages"),
        (CHAT, chat(tools=[{"type": "function", "function": function}]), "tools"),
    ):
        answer = server.post(path, body)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert "letters" in answer.error["message"]
    monkeypatch.undo()


@pytest.mark.parametrize("place", ["prompt", "content", "reasoning", "name", "tool_call_id"])
def test_what_is_too_long_is_not_cut_to_its_end(server, monkeypatch, place):
    """Wherever it stands, and although each of its tokens may have many letters."""
    tokenizer = server.engine.base.tokenizer
    shown = "{% for m in messages %}{% for name in m %}{{ m[name] }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", shown)
    cut, encode = [], tokenizer._tokenizer._encode_plus

    def watched(*given, **how):
        cut.append(len(given[0] if given else how["text"]))
        return encode(*given, **how)

    monkeypatch.setattr(tokenizer._tokenizer, "_encode_plus", watched)
    long = "ab c" * (1 << (14 if place in ("prompt", "content") else 20))
    role = {"reasoning": "assistant", "tool_call_id": "tool"}.get(place, "user")
    turn = {"role": role, "content": "", place: long}
    path, body = (TEXT, text(prompt=long)) if place == "prompt" else (CHAT, chat(messages=[turn]))
    answer = server.post(path, body)
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert sum(cut) <= 1 << 17
    assert server.post(CHAT, chat()).status == 200


# Who may ask


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.nip.io", "", "a b", "localhost:x"])
def test_another_host_is_refused_everywhere(server, host):
    for answer in server.ask(*(request("POST", path, b"{}", {"Host": host}) for path in PATHS)):
        assert answer.status == 403 and answer.error["type"] == "permission_error"


@pytest.mark.parametrize("hosts", [b"", b"Host: localhost\r\nHost: evil.example\r\n"])
def test_a_host_is_said_once(server, hosts):
    (answer,) = server.ask(b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n" + hosts + b"\r\n")
    assert answer.status in (400, 403) and answer.error


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "file://", "http://127.0.0.1:1"])
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
def test_pages_of_others_are_refused_and_read_nothing(server, origin, method):
    for path in (CHAT, "/v1/models", "/health"):
        answer = server.ask(request(method, path, b"{}", {"Origin": origin}))[0]
        assert answer.status == 403 and answer.error
        assert answer.header("access-control-allow-origin") is None


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "x", ""])
def test_a_form_of_another_page_is_no_request(server, kind):
    body = json.dumps(chat()).encode()
    assert server.ask(request("POST", CHAT, body, {"Content-Type": kind}))[0].status == 415


# Bodies


@pytest.mark.parametrize("length", ["99999999999", "8388609", "9" * 19])
def test_a_body_that_is_too_large_is_refused_by_its_length(server, monkeypatch, length):
    monkeypatch.setattr(server.guard, "rules", replace(server.guard.rules, body_seconds=0.05))
    answer = server.ask(request("POST", TEXT, b"{", {"Content-Length": length}))[0]
    assert answer.status == 413 and answer.error


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 5000, "1, 2", "0x10", "\u0663"])
def test_a_length_that_is_none_is_no_http(server, length):
    answer = server.ask(request("POST", TEXT, b"{", {"Content-Length": length}))[0]
    assert answer.status == 400 and answer.error


def test_a_body_that_is_too_large_and_sent_whole_is_told_so(server):
    body = json.dumps(text(prompt="x" * (9 << 20))).encode()
    assert server.ask(request("POST", TEXT, body))[0].status == 413


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"\0", b"null", b"[]", b"{", b"\xff\xfe{}", b'{"a": 1, "a": 2}', b"{}{}", b"NaN"),
        *(b"[" * 100_000, b'{"a":' * 100_000, b'{"model": ' + b"1" * 100_000 + b"}"),
        *(b'{"model": "\\ud800"}', b'{"temperature": 1e999}', b'{"temperature": NaN}'),
    ],
)
def test_what_is_no_json_is_refused(server, body):
    paths = (CHAT, TEXT, "/v1/load_lora_adapter")
    for answer in server.ask(*(request("POST", path, body) for path in paths)):
        assert answer.status == 400 and answer.error


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED += b"Transfer-Encoding: chunked\r\n"


def whole_chunk(body):
    return b"%x\r\n%b\r\n" % (len(body), body)


def test_a_body_in_chunks_is_one(server):
    body = json.dumps(text()).encode()
    pieces = b"".join(whole_chunk(body[i : i + 7]) for i in range(0, len(body), 7))
    (answer,) = server.ask(CHUNKED + b"Connection: close\r\n\r\n" + pieces + b"0\r\n\r\n")
    assert answer.status == 200


@pytest.mark.parametrize(
    "pieces",
    [b"zz\r\n{}\r\n0\r\n\r\n", b"-5\r\n{}", b"2\r\n{}XX", b"f" * 40 + b"\r\n{}", b"\r\n\r\n"],
)
def test_chunks_that_lie_are_no_http(server, pieces):
    (answer,) = server.ask(CHUNKED + b"\r\n" + pieces)
    assert answer.status == 400 and answer.error


def test_chunks_without_end_are_cut_off(server, monkeypatch):
    monkeypatch.setattr(server.guard, "rules", replace(server.guard.rules, body_seconds=0.5))
    (answer,) = server.ask(CHUNKED + b"\r\n" + whole_chunk(b"[" * 65536) * 160)
    assert answer.status == 413


def test_a_coding_that_is_not_known_and_a_length_beside_chunks_are_no_http(server):
    for more in (b"Transfer-Encoding: gzip\r\n", b"Transfer-Encoding: chunked\r\n"):
        (answer,) = server.ask(CHUNKED + more + b"\r\n0\r\n\r\n")
        assert answer.status == 400 and answer.error


@pytest.mark.parametrize("head", [CHUNKED + b"\r\n2\r\n{", request("POST", CHAT, b"{}" * 9)[:-1]])
def test_a_body_that_stops_half_way_times_out(server, monkeypatch, head):
    monkeypatch.setattr(server.guard, "rules", replace(server.guard.rules, body_seconds=0.05))
    (answer,) = server.ask(head)
    assert answer.status == 408 and answer.error


def test_half_a_request_is_not_acted_on(server):
    """Its body is valid as far as it goes."""
    body = json.dumps({"lora_name": "half", "lora_path": "team/third"}).encode()

    async def go():
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        length = {"Content-Length": str(len(body) + 9)}
        writer.write(request("POST", "/v1/load_lora_adapter", body, length))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    asyncio.run(go())
    server.check_well()
    assert "half" not in server.engine.names


# Sockets


def speak(server, script):
    """Run script(reader, writer) on a connection."""

    async def go():
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            async with asyncio.timeout(SECONDS):
                return await script(reader, writer)
        finally:
            writer.transport.abort()

    return asyncio.run(go())


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.05)


@pytest.mark.parametrize("begun", [b"", b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: "])
def test_headers_that_never_end_are_not_waited_for(server, hasty, begun):
    async def script(reader, writer):
        writer.write(begun)
        assert await reader.read() == b""

    speak(server, script)


@pytest.mark.parametrize(
    "line",
    [
        b"GET /\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n",
        b"A" * 100_000 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: \0\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"\r\n" * 20 + b"x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: " + b"b" * 300_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 50_000,
    ],
)
def test_what_is_no_http_is_refused_as_such(server, line):
    (answer,) = server.ask(line)
    assert answer.status in (400, 403) and answer.error


def test_garbage_during_a_stream_is_that_connection_s_alone(server):
    async def script(reader, writer):
        body = json.dumps(text(stream=True, max_tokens=50, logit_bias=ON)).encode()
        writer.write(request("POST", TEXT, body, {"Connection": "keep-alive"}))
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.write(b"\0\0garbage\r\n\r\n" * 10)
        async for _ in reader:
            pass

    speak(server, script)


def test_pipelined_requests_are_answered_in_turn(server):
    body = json.dumps(text()).encode()
    ask = request("POST", TEXT, body, {"Connection": "keep-alive"})

    async def script(reader, writer):
        writer.write(GET + ask + GET + ask + request("GET", "/v1/models"))
        return await reader.read()

    answers = speak(server, script)
    assert answers.count(b"HTTP/1.1 200 OK") == 5
    assert answers.index(b'"text_completion"') > answers.index(b'"status":"ok"')


def test_who_reads_nothing_is_let_go(server, monkeypatch):
    """One that asks again and again and reads no answer: its connection ends, not the server."""
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 0.2)

    async def go():
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
        writer.transport.pause_reading()
        lines = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(SECONDS):
                while True:
                    writer.write(lines)
                    await writer.drain()
        writer.transport.abort()

    asyncio.run(go())


def test_idle_connections_make_room_for_others(server):
    async def go():
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(600)]
        for _, writer in idle[::3]:
            writer.write(b"GET / HTTP/1.1\r\nX: ")
        body = json.dumps(text()).encode()
        asked = [exchange(server.port, request("POST", TEXT, body)) for _ in range(20)]
        answers = await asyncio.gather(*asked)
        for _, writer in idle:
            writer.transport.abort()
        return answers

    assert [answer.status for answer in asyncio.run(go())] == [200] * 20


def test_half_sent_bodies_make_room_for_others(server):
    async def go():
        half = request("POST", TEXT, b"{", {"Content-Length": "100"})
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(600)]
        for _, writer in idle:
            writer.write(half)
        answer = await exchange(server.port, request("GET", "/v1/models"))
        for _, writer in idle:
            writer.transport.abort()
        return answer

    assert asyncio.run(go()).status == 200


def test_where_all_connections_are_at_work_one_more_is_told_so(server, monkeypatch):
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", 1)

    async def go():
        body = json.dumps(text(stream=True, max_tokens=1900, logit_bias=ON)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request("POST", TEXT, body))
        await reader.readline()
        more, other = await asyncio.open_connection("127.0.0.1", server.port)
        reading = Reading()
        reading.take(await more.read())
        writer.transport.abort()
        other.transport.abort()
        return reading.answer

    answer = asyncio.run(go())
    assert answer.status == 503 and answer.error


def test_the_process_may_open_as_many_files_as_it_has_connections():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > protocol.MOST_CONNECTIONS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Paths and methods


@pytest.mark.parametrize(
    "path",
    [
        *("/page/../../pyproject.toml", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/%00"),
        *(
            "/page/....//app.py",
            "/page//etc/passwd",
            "/page/%5c..%5capp.py",
            "/page/%ff%fe",
            "/%00",
        ),
        *("/page/" + "a" * 5000, "/page/" + "a/" * 5000, "/v1/models/../../etc/passwd", "//", "/%"),
        *("/page/%252e%252e/app.py", "/page/./../app.py", "http://evil.example/v1/x", "*", "/v1"),
        *("/v1/models/%2e%2e%2f%2e%2e", "/v1/models/" + "x" * 9000, "/page/\\..\\app.py"),
    ],
)
def test_no_path_leads_out_of_the_page(server, path):
    answer = server.ask(
        b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path.encode()
    )[0]
    assert answer.status == 404 and answer.error
    assert b"import" not in answer.body and b"root:" not in answer.body


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"])
def test_other_methods_are_refused(server, method):
    for answer in server.ask(*(request(method, path) for path in PATHS), method=method):
        assert answer.complete and answer.status in (200, 404, 405)
        if method == "HEAD":
            assert answer.body == b""
        else:
            assert answer.status != 200 and answer.error


@pytest.mark.parametrize("path", ["/", CHAT, "/v1/models", "/ws"])
def test_a_websocket_is_not_spoken(server, path):
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    asked = request("GET", path, headers={**headers, "Sec-WebSocket-Key": "eA=="})

    async def script(reader, writer):
        writer.write(asked)
        return await reader.readline()

    assert speak(server, script).split()[1] in (b"200", b"404", b"405")


# Adapters


@pytest.mark.parametrize(
    "path",
    [
        *(
            "..",
            "../model",
            ".",
            "",
            "/etc",
            "team/../../model",
            "mlx-community/x",
            "~",
            "\0",
            "team",
        ),
        *("x" * 5000, "team/third/adapters.safetensors", "\u202e", "%2e%2e/model", "C:\\x", "a\nb"),
    ],
)
def test_no_adapter_is_loaded_from_elsewhere(server, path):
    answer = server.post("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": path})
    assert (answer.status, answer.error["param"]) == (400, "lora_path")
    assert str(server.root) not in answer.body.decode()


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a b", "x" * 97, "\0", BASE, "one", "é", "a\n"]
)
def test_no_adapter_has_such_a_name(server, name):
    body = {"lora_name": name, "lora_path": "team/third"}
    answer = server.post("/v1/load_lora_adapter", body)
    assert (answer.status, answer.error["param"]) == (400, "lora_name")


def test_adapters_come_and_go_while_they_are_asked(server):
    """Whoever asks for one that has just gone is told so, and nobody else notices."""
    name = {"lora_name": "third"}

    async def go():
        async def turn():
            for step, more in (("load", {"lora_path": "team/third"}), ("unload", {})):
                sent = json.dumps({**name, **more}).encode()
                yield await exchange(server.port, request("POST", f"/v1/{step}_lora_adapter", sent))

        async def asks(model):
            body = json.dumps(text(model=model)).encode()
            return [await exchange(server.port, request("POST", TEXT, body)) for _ in range(6)]

        asked = [asyncio.ensure_future(asks(model)) for model in ("third", "third", "one", "dora")]
        turned = [answer for _ in range(4) for answer in [one async for one in turn()]]
        return turned, await asyncio.gather(*asked)

    turned, (third, again, one, dora) = asyncio.run(go())
    assert [answer.status for answer in turned] == [200] * 8
    assert {answer.status for answer in third + again} <= {200, 404}
    assert {answer.status for answer in one + dora} == {200}


def test_a_broken_adapter_is_refused_and_told_of(server, tmp_path):
    whole = server.root / "team" / "third"
    for number, file in enumerate(sorted(path.name for path in whole.iterdir())):
        copy = server.root / f"broken{number}"
        copy.mkdir()
        for part in whole.iterdir():
            data = part.read_bytes()
            (copy / part.name).write_bytes(data[: len(data) // 2] if part.name == file else data)
        body = {"lora_name": "broken", "lora_path": copy.name}
        answer: Answer = server.post("/v1/load_lora_adapter", body)
        if answer.status == 200:  # a file that an adapter does not need
            assert server.post("/v1/unload_lora_adapter", {"lora_name": "broken"}).status == 200
        else:
            assert (answer.status, answer.error["param"]) == (400, "lora_path")
