"""The application: requests of OpenAI's form, answered by an engine."""

import asyncio
import json

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import adapter_for, ask

from mlxlora.generate import chat_tokens
from mlxlora.serve.engine import Engine, Options
from mlxlora.serve.http.app import application
from mlxlora.serve.http.guard import Rules
from mlxlora.serve.http.metrics import CONTENT_TYPE
from mlxlora.serve.http.service import Service

STRANGE = {"type": "json_schema", "json_schema": {"schema": {"type": "?"}}}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def engine(dense):
    with Engine(dense, {"one": adapter_for(dense, 1)}, Options(rows=4, waiting=4)) as engine:
        yield engine


@pytest.fixture
def said():
    return []


@pytest.fixture
def service(engine, tmp_path, said):
    return Service(engine, "tiny", adapter_root=tmp_path, say=said.append)


@pytest.fixture
def send(service):
    app = application(service, Rules())

    def send(method, path, body=None):
        async def go():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as c:
                return await c.request(method, path, json=body)

        return asyncio.run(go())

    return send


def chat(**more):
    return {"model": "one", "messages": HI, "max_tokens": 12, **more}


def events(answer):
    *lines, last = [line for line in answer.text.split("\n\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_an_answer_is_the_engine_s(send, engine, said):
    tokens = chat_tokens(engine.base.tokenizer, HI)
    expected = ask(engine, tokens, "one", max_tokens=12).text
    answer = send("POST", "/v1/chat/completions", chat())
    found = ChatCompletion.model_validate(answer.json())
    assert found.choices[0].message.content == expected
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(tokens)
    assert found.usage.completion_tokens == 12
    assert said[-1].startswith(f"one  {len(tokens)} tokens")


def test_a_stream_says_the_same_and_then_how_much(send):
    whole = send("POST", "/v1/chat/completions", chat(n=2, seed=1, temperature=1)).json()
    answer = send(
        "POST",
        "/v1/chat/completions",
        chat(n=2, seed=1, temperature=1, stream=True, stream_options={"include_usage": True}),
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = [ChatCompletionChunk.model_validate(event) for event in events(answer)]
    assert {c.choices[0].delta.role for c in chunks[:2]} == {"assistant"}
    for index in (0, 1):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        text = "".join(one.delta.content or "" for one in own)
        assert text == whole["choices"][index]["message"]["content"]
        assert own[-1].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 24 and not chunks[-1].choices


def test_completions_take_lists_and_tokens(send, engine):
    expected = [ask(engine, list(text.encode()), max_tokens=5).text for text in ("ab", "cd")]
    body = {"model": "tiny", "prompt": ["ab", "cd"], "max_tokens": 5}
    found = send("POST", "/v1/completions", body).json()
    tokens = engine.base.tokenizer.encode("ab")
    by_tokens = send("POST", "/v1/completions", {**body, "prompt": tokens}).json()
    assert len(found["choices"]) == len(expected)
    assert by_tokens["choices"][0]["text"] == found["choices"][0]["text"]


def test_models_are_the_base_and_its_adapters(send):
    listed = send("GET", "/v1/models").json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("tiny", None), ("one", "tiny")]
    assert listed[1]["max_model_len"] == 512 and "chat" in listed[1]["capabilities"]
    assert send("GET", "/v1/models/one").json() == listed[1]
    assert send("GET", "/v1/models/a/b").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (chat(model="nobody"), 404, "model"),
        (chat(model="../etc"), 404, "model"),
        (chat(messages=[]), 400, "messages"),
        (chat(messages=[{"role": "user", "content": "x" * 5000}]), 400, "messages"),
        (chat(top_k=-1), 400, "top_k"),
        (chat(response_format=STRANGE), 400, "response_format"),
        (chat(nonsense=1), 400, "nonsense"),
        (chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
        ([], 400, None),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_its_field(send, engine, body, status, param):
    answer = send("POST", "/v1/chat/completions", body)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param
    assert engine.health()["running"] == 0


def test_json_is_held_to_its_schema(send):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    held = {"schema": {**schema, "additionalProperties": False}, "name": "x"}
    asked = chat(response_format={"type": "json_schema", "json_schema": held}, max_tokens=60)
    found = send("POST", "/v1/chat/completions", asked).json()["choices"][0]
    assert json.loads(found["message"]["content"]) in ({"a": 1}, {"a": 2})
    assert found["finish_reason"] == "stop"


def test_adapters_are_loaded_from_the_root_and_unloaded(send, dense, tmp_path, engine):
    adapter_for(dense, 2).save(tmp_path / "inside" / "two")
    load = "/v1/load_lora_adapter"
    assert send("POST", load, {"lora_name": "two", "lora_path": "inside/two"}).status_code == 200
    assert send("POST", "/v1/chat/completions", chat(model="two")).status_code == 200
    again = send("POST", load, {"lora_name": "two", "lora_path": "inside/two"})
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    for path in ("../x", "/etc", "nothing"):
        refused = send("POST", load, {"lora_name": "x", "lora_path": path})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_path")
    unload = "/v1/unload_lora_adapter"
    assert send("POST", unload, {"lora_name": "two"}).status_code == 200
    assert send("POST", unload, {"lora_name": "two"}).status_code == 404
    assert send("POST", "/v1/chat/completions", chat(model="two")).status_code == 404


def test_without_a_root_adapters_stay_as_they_are(send, service):
    service.adapter_root = None
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = send("POST", path, {"lora_name": "one", "lora_path": "one"})
        assert answer.status_code == 404 and "--adapter-root" in answer.text


def test_too_many_are_told_when_to_come_again(send, engine):
    answer = send("POST", "/v1/chat/completions", chat(n=16))
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert send("POST", "/v1/chat/completions", chat()).status_code == 200


def test_health_is_the_engine_s(send, engine):
    assert send("GET", "/health").json()["status"] == "ok"
    engine.stop()
    answer = send("GET", "/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "stopped")


def test_metrics_count(send):
    send("POST", "/v1/chat/completions", chat())
    send("GET", "/nowhere")
    answer = send("GET", "/metrics")
    assert answer.headers["content-type"] == CONTENT_TYPE
    lines = answer.text.splitlines()
    assert "mlxlora_answers_total 1" in lines
    assert "mlxlora_tokens_total 12" in lines
    assert 'mlxlora_http_responses_total{code="404"} 1' in lines


def test_the_page_may_run_its_own_files_alone(send):
    page = send("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert send("GET", "/page/index.html").headers["content-security-policy"] == policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for name in ("main.js", "style.css"):
        assert send("GET", f"/page/{name}").status_code == 200
    assert send("GET", "/page/../app.py").status_code == 404


@pytest.mark.parametrize(("method", "path"), [("PUT", "/v1/models"), ("GET", "/v1/completions")])
def test_other_methods_are_refused_in_the_same_shape(send, method, path):
    answer = send(method, path)
    assert answer.status_code == 405 and answer.json()["error"]["message"]


def test_a_fault_of_ours_says_so_and_no_more(send, service, monkeypatch):
    monkeypatch.setattr(service, "models", lambda: 1 / 0)
    answer = send("GET", "/v1/models")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "division" not in answer.text


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_not_answered_any_further(service, engine, stream):
    """Given as ASGI messages: the client is gone as soon as its request was read."""
    app = application(service, Rules())
    body = json.dumps(chat(max_tokens=400, stream=stream)).encode()
    given = iter([{"type": "http.request", "body": body}])

    async def receive():
        message = next(given, None)
        if message is None:
            while not engine.health()["running"]:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}
        return message

    async def answer(message):
        return None

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"",
        "root_path": "",
        "query_string": b"",
        "headers": headers,
    }
    asyncio.run(app(scope, receive, answer))
    ask(engine, [1, 2, 3]).wait()
    assert engine.vitals.counters.cancelled == 1
    assert engine.health()["running"] == 0
