"""Clients that people have: the openai package, and curl as the README says it."""

import asyncio
import json
import shutil
import subprocess
import threading
from dataclasses import replace
from typing import Literal

import openai
import pytest
from documents import blocks, guide
from live_server import BASE, END, SECONDS, live
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from mlxlora.serve.engine import Options
from mlxlora.serve.orders import Busy, End, Piece

HI = [{"role": "user", "content": "hi"}]
ON = {str(END): -100}  # the answer does not end by itself
LONG = 1900
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "a sum",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    where = tmp_path_factory.mktemp("clients") / "served"
    with live(where, options=Options(rows=8, waiting=64), max_tokens=12) as found:
        yield found
        found.check_well()


@pytest.fixture
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=SECONDS) as client:
        yield client


@pytest.fixture
def scripted(server, monkeypatch):
    """The engine answers every order with these texts."""

    def answers(*texts):
        def submit(order, sink):
            for text in texts:
                sink(Piece(text))
            sink(End("stop", len(order.prompt), 0, len(texts)))
            return Taken()

        monkeypatch.setattr(server.engine, "submit", submit)

    return answers


class Taken:
    def cancel(self):
        pass


def test_models_are_listed_and_told_of(client):
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) >= {BASE, "one", "two", "dora"}
    assert client.models.retrieve("one") == listed["one"]
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("nobody/else")
    assert refused.value.param == "model" and refused.value.code == "model_not_found"


@pytest.mark.parametrize("model", [BASE, "one", "two", "dora"])
def test_a_chat_says_the_same_streamed_or_whole(client, model):
    asked = {"model": model, "messages": HI, "max_tokens": 20, "logit_bias": ON}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert told[0].delta.role == "assistant"
    assert "".join(one.delta.content or "" for one in told) == whole.choices[0].message.content
    assert told[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_helper_for_streams_gathers_the_answer(client, scripted):
    scripted("Hel", "lo")
    with client.chat.completions.stream(model="one", messages=HI) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert events.count("content.delta") >= 2
    assert final.choices[0].message.content == "Hello"


def test_many_ask_at_once_and_each_is_answered_alone(server):
    async def go():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:

            async def ask(model, word):
                answer = await client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": word}], max_tokens=10
                )
                return answer.choices[0].message.content

            async def told(model, word):
                stream = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": word}],
                    max_tokens=10,
                    stream=True,
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            pairs = [(model, word) for model in (BASE, "one", "two") for word in ("a", "bee")]
            alone = [await ask(*pair) for pair in pairs]
            together = await asyncio.gather(*(told(*pair) for pair in pairs * 2))
            return alone * 2, together

    alone, together = asyncio.run(go())
    assert together == alone


# Tools


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("stream", [True, False])
def test_a_tool_that_must_be_called_is(client, choice, stream):
    asked = {"model": "one", "messages": HI, "tools": [ADD], "tool_choice": choice}
    asked["max_tokens"] = 400
    if stream:
        with client.chat.completions.stream(**asked) as events:
            for _ in events:
                pass
            (told,) = events.get_final_completion().choices
    else:
        (told,) = client.chat.completions.create(**asked).choices
    (call,) = told.message.tool_calls
    assert told.finish_reason == "tool_calls" and call.type == "function" and call.id
    assert call.function.name == "add" and 0 <= json.loads(call.function.arguments)["a"] <= 99


@pytest.mark.parametrize("stream", [True, False])
def test_calls_among_words_are_told_apart(client, scripted, stream):
    add = '{"name": "add", "arguments": {"a": 1}}'
    scripted("so: <tool", f"_call>\n{add}\n</tool_", f"call>\n<tool_call>{add}</tool_call>")
    asked = {"model": "one", "messages": HI, "tools": [ADD, OTHER]}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            for _ in events:
                pass
            (told,) = events.get_final_completion().choices
    else:
        (told,) = client.chat.completions.create(**asked).choices
    assert told.message.content == "so:" and told.finish_reason == "tool_calls"
    calls = told.message.tool_calls
    assert [call.function.name for call in calls] == ["add", "add"]
    assert [json.loads(call.function.arguments) for call in calls] == [{"a": 1}] * 2
    assert len({call.id for call in calls}) == 2


def test_a_call_s_result_goes_back_as_the_client_has_it(client):
    first = client.chat.completions.create(
        model="one", messages=HI, tools=[ADD], tool_choice="required", max_tokens=400
    )
    said = first.choices[0].message
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "3"}
    answer = client.chat.completions.create(
        model="one", messages=[*HI, said, result], tools=[ADD], max_tokens=3
    )
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens


# Answers held to a form


class Reading(BaseModel):
    kind: Literal["warm", "cold"]
    degrees: int = Field(ge=-99, le=99)
    sure: bool


def test_a_class_is_parsed_into(client):
    answer = client.chat.completions.parse(
        model="two", messages=HI, response_format=Reading, max_tokens=400
    )
    assert isinstance(answer.choices[0].message.parsed, Reading)


def test_any_object_is_one(client, server):
    (brace,) = server.engine.base.tokenizer.encode("}")
    answer = client.chat.completions.create(
        model="two",
        messages=HI,
        response_format={"type": "json_object"},
        logit_bias={str(brace): 100},
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_schema_that_cannot_be_followed_is_refused_by_name(client):
    schema = {"name": "x", "schema": {"$ref": "#/nowhere"}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="one",
            messages=HI,
            response_format={"type": "json_schema", "json_schema": schema},
        )
    assert refused.value.param == "response_format"


# Log-probabilities, seeds, stops


def test_logprobs_of_a_chat_are_the_same_streamed(client):
    asked = {"model": "one", "messages": HI, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    chunks = client.chat.completions.create(**asked, stream=True)
    told = [
        one
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.token for one in told] == [one.token for one in whole]
    for one in whole:
        assert len(one.top_logprobs) == 3 and one.logprob <= 0
        assert one.top_logprobs[0].logprob == pytest.approx(one.logprob)  # greedy


def test_logprobs_of_a_completion(client):
    asked = {"model": "one", "prompt": "hi", "max_tokens": 5, "logprobs": 2}
    answer = client.completions.create(**asked).choices[0]
    assert len(answer.logprobs.tokens) == len(answer.logprobs.token_logprobs) == 5
    assert all(len(top) <= 2 for top in answer.logprobs.top_logprobs)
    assert answer.logprobs.text_offset[0] == 0
    told = list(client.completions.create(**asked, stream=True))
    tokens = [
        t for c in told if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.tokens
    ]
    assert tokens == answer.logprobs.tokens


def test_completions_of_lists_of_texts_and_of_tokens(client):
    texts = client.completions.create(model=BASE, prompt=["ab", "cd"], max_tokens=4, n=2, seed=1)
    assert [one.index for one in texts.choices] == [0, 1, 2, 3]
    tokens = client.completions.create(model=BASE, prompt=[[1, 2], [3]], max_tokens=4)
    assert len(tokens.choices) == 2
    echoed = client.completions.create(model=BASE, prompt="abc", max_tokens=4, echo=True)
    plain = client.completions.create(model=BASE, prompt="abc", max_tokens=4)
    assert echoed.choices[0].text == "abc" + plain.choices[0].text


def test_a_stop_ends_a_stream_and_is_not_part_of_it(client):
    asked = {"model": BASE, "prompt": "hi", "max_tokens": 30, "logit_bias": ON}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[7:9]
    chunks = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_same_seed_is_the_same_answer_whoever_else_asks(client, server):
    def ask(seed, temperature=1.5):
        answer = client.completions.create(
            model="one", prompt="hi", max_tokens=20, seed=seed, temperature=temperature
        )
        return answer.choices[0].text

    alone = ask(11)
    found = []
    threads = [
        threading.Thread(target=lambda seed=seed: found.append((seed, ask(seed))))
        for seed in (1, 2, 11, 3, 11, 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert [text for seed, text in found if seed == 11] == [alone, alone]
    assert len({text for _, text in found}) == 5


def test_a_bias_decides(client, server):
    (token,) = server.engine.base.tokenizer.encode("z")
    answer = client.completions.create(
        model=BASE, prompt="hi", max_tokens=5, logit_bias={str(token): 100}
    )
    assert answer.choices[0].text == "zzzzz"


# Refusals


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
        ),
        ({"extra_body": {"xtc_threshold": 0.9}}, "xtc_threshold"),
    ],
)
def test_a_bad_field_is_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": BASE, "messages": HI, **fields})
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_what_others_added_can_be_said(client):
    body = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1}
    body["chat_template_kwargs"] = {"enable_thinking": False}
    assert client.chat.completions.create(model=BASE, messages=HI, extra_body=body).choices


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-4o", messages=HI)
    assert refused.value.param == "model"


def test_a_body_that_is_too_large_is_told_so(client):
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model=BASE, prompt="x" * (9 << 20))
    assert refused.value.status_code == 413


def test_the_key_is_wanted(client, server, monkeypatch):
    monkeypatch.setattr(server.guard, "rules", replace(server.guard.rules, key="secret"))
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert list(client.with_options(api_key="secret").models.list())


def test_who_comes_too_early_comes_again_when_told(client, server, monkeypatch):
    submit, slept, turned_away = server.engine.submit, [], []

    def busy(order, sink):
        if len(turned_away) < 2:
            turned_away.append(order)
            raise Busy("9 requests wait already", 7)
        return submit(order, sink)

    monkeypatch.setattr(server.engine, "submit", busy)
    monkeypatch.setattr("openai._base_client.time.sleep", slept.append)
    assert client.with_options(max_retries=2).completions.create(model=BASE, prompt="hi").choices
    assert slept == [7, 7]
    turned_away.clear()
    with pytest.raises(openai.RateLimitError) as refused:
        client.with_options(max_retries=0).completions.create(model=BASE, prompt="hi")
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.response.headers["retry-after"] == "7"


# Who leaves


def test_a_stream_that_is_closed_frees_its_row(client, server):
    gone = server.engine.vitals.counters.cancelled
    stream = client.completions.create(
        model=BASE, prompt="hi", max_tokens=LONG, logit_bias=ON, stream=True
    )
    next(stream)
    assert server.engine.health()["running"] == 1
    stream.close()
    server.quiet()
    assert server.engine.vitals.counters.cancelled == gone + 1


def test_a_client_that_waits_no_longer_frees_its_row(client, server):
    gone = server.engine.vitals.counters.cancelled
    impatient = client.with_options(timeout=0.3, max_retries=0)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model=BASE, prompt="hi", max_tokens=LONG, logit_bias=ON, n=8)
    server.quiet()
    assert server.engine.vitals.counters.cancelled == gone + 8


# The README


@pytest.fixture
def as_in_the_readme(server):
    """The adapters that it speaks of."""
    whole = server.root / "team" / "third"
    if not (server.root / "sql").exists():
        shutil.copytree(whole, server.root / "sql")
        shutil.copytree(whole, server.root / "mine")
    loaded = server.post("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "mine"})
    assert loaded.status == 200
    yield
    for name in ("mine", "sql"):
        server.post("/v1/unload_lora_adapter", {"lora_name": name})


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_readme_s_curl_lines(server, as_in_the_readme):
    (block,) = [block for block in blocks(guide("serving"), "sh") if block.startswith("curl")]
    lines = block.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}")
    *commands, rest = [command for command in lines.replace("\\\n", " ").split("\n")]
    assert rest == "" and len(commands) == 4
    models, chat, stream, load = [
        subprocess.run(
            ["sh", "-c", f"{command} --silent --show-error --fail-with-body"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        ).stdout
        for command in commands
    ]
    assert "mine" in {model["id"] for model in json.loads(models)["data"]}
    assert json.loads(chat)["choices"][0]["message"]["role"] == "assistant"
    assert stream.startswith("data: {") and stream.endswith("data: [DONE]\n\n")
    assert json.loads(load)["status"] == "ok"
    assert "sql" in server.engine.names


def test_the_readme_s_client_in_python(server, as_in_the_readme, capsys):
    (code,) = [
        block for block in blocks(guide("serving"), "python") if block.startswith("from openai")
    ]
    code = code.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}")
    exec(compile(code + "\nclient.close()", "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
