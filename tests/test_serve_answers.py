"""Answers in OpenAI's form, read by OpenAI's own types."""

import json

import pytest
from conftest import write_tokenizer
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from test_serve_speech import ONE, TOOLS, tokenizer

from mlxlora.base import open_tokenizer
from mlxlora.serve.orders import End, Fault, Piece, Spelled
from mlxlora.serve.wire.answers import LEAST, head, usage
from mlxlora.serve.wire.chat_answers import ChatChoice, chat_chunk, chat_completion
from mlxlora.serve.wire.refusals import error_body, of_fault
from mlxlora.serve.wire.speech import Manner, Speech
from mlxlora.serve.wire.spelling import Spelling
from mlxlora.serve.wire.text_answers import TextChoice, completion, completion_chunk

END = End("stop", 5, 2, 7)
INFINITE = float("-inf")


@pytest.fixture
def spelled(tmp_path):
    write_tokenizer(tmp_path)
    return open_tokenizer(tmp_path, {})


def read(kind, value):
    """OpenAI's own type of it, strictly, from the bytes that go out."""
    json.dumps(value, allow_nan=False)
    return kind.model_validate_json(json.dumps(value), strict=True)


def chat_choice(manner=None, spelling=None, index=0):
    return ChatChoice(index, Speech(tokenizer(), manner), spelling)


def streamed(choice, pieces, end=END):
    first = [choice.first()]
    parts = [*first, *(choice.piece(piece) for piece in pieces), *choice.end(end)]
    return [part for part in parts if part is not None]


def test_a_chat_is_whole_what_its_chunks_add_up_to():
    text = f"<think>hm</think>so: {ONE}\n{ONE}"
    choice = chat_choice(Manner(tools=TOOLS))
    about = head("chatcmpl", "m", "f")
    parts = streamed(choice, [Piece(letter) for letter in text])
    chunks = [read(ChatCompletionChunk, chat_chunk(about, [part])) for part in parts]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    whole = read(ChatCompletion, chat_completion(about, [choice], usage([(0, END)])))
    message = whole.choices[0].message
    assert deltas[0].role == "assistant" and [d.role for d in deltas[1:]] == [None] * len(
        deltas[1:]
    )
    assert "".join(d.content or "" for d in deltas) == message.content == "so:"
    for name in ("reasoning", "reasoning_content"):
        assert "".join(getattr(d, name, "") for d in deltas) == getattr(message, name) == "hm"
    calls = [call for d in deltas for call in d.tool_calls or ()]
    assert [call.index for call in calls] == [0, 1] and len({call.id for call in calls}) == 2
    assert [c.function.arguments for c in calls] == [
        c.function.arguments for c in message.tool_calls
    ]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]
    assert whole.choices[0].finish_reason == "tool_calls"
    assert {chunk.id for chunk in chunks} == {whole.id} and whole.id.startswith("chatcmpl-")
    assert (whole.model, whole.system_fingerprint) == ("m", "f")


def test_content_is_null_beside_calls_alone_and_text_otherwise():
    called, said = chat_choice(Manner(tools=TOOLS)), chat_choice()
    streamed(called, [Piece(ONE)])
    streamed(said, [])
    assert called.whole()["message"]["content"] is None
    assert said.whole()["message"]["content"] == ""


def test_log_probabilities_of_a_chat_go_out_once_and_in_order(spelled):
    tokens = spelled.encode("a<€")
    told = [Spelled(t, -0.5 - n, ((t, -0.5), (7, INFINITE))) for n, t in enumerate(tokens)]
    choice = chat_choice(spelling=Spelling(spelled))
    texts = ["a", "<", "", "", "€"]
    pieces = [Piece(text, (one,)) for text, one in zip(texts, told, strict=True)]
    about = head("chatcmpl", "m", "f")
    chunks = [
        read(ChatCompletionChunk, chat_chunk(about, [part])) for part in streamed(choice, pieces)
    ]
    out = [
        one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content or ()
    ]
    whole = read(ChatCompletion, chat_completion(about, [choice], usage([(0, END)])))
    assert out == whole.choices[0].logprobs.content
    assert bytes(byte for one in out for byte in one.bytes).decode() == "a<€"
    assert [one.logprob for one in out] == [-0.5, -1.5, -2.5, -3.5, -4.5]
    assert out[0].token == "a" and out[0].top_logprobs[0].token == "a"
    assert out[0].top_logprobs[1].logprob == LEAST


def test_held_back_tokens_go_out_at_the_end(spelled):
    choice = chat_choice(spelling=Spelling(spelled))
    (token,) = spelled.encode("<")
    parts = streamed(choice, [Piece("<", (Spelled(token, -1.0),))])
    assert [part["delta"].get("content") for part in parts] == ["", "<", None]
    assert len(parts[1]["logprobs"]["content"]) == 1


def test_a_choice_without_log_probabilities_says_null():
    choice = chat_choice()
    assert all(part["logprobs"] is None for part in streamed(choice, [Piece("a")]))
    assert choice.whole()["logprobs"] is None


def test_several_choices_count_their_prompt_once():
    ends = [(0, End("stop", 5, 0, 7)), (0, End("length", 5, 5, 3)), (1, End("stop", 2, 1, 1))]
    assert usage(ends) == {
        "prompt_tokens": 7,
        "completion_tokens": 11,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_usage_goes_out_in_a_chunk_without_choices():
    chunk = read(ChatCompletionChunk, chat_chunk(head("chatcmpl", "m", "f"), [], usage([(0, END)])))
    assert chunk.choices == [] and chunk.usage.prompt_tokens_details.cached_tokens == 2


def test_a_completion_is_whole_what_its_chunks_add_up_to(spelled):
    tokens = spelled.encode("a€b")
    told = [Spelled(t, -1.0, ((t, -1.0), (7, INFINITE))) for t in tokens]
    texts = ["a", "", "", "€", "b"]
    choice = TextChoice(1, "", Spelling(spelled))
    about = head("cmpl", "m", "f")
    pieces = [Piece(text, (one,)) for text, one in zip(texts, told, strict=True)]
    *parts, last = streamed(choice, pieces)
    # OpenAI's servers say null until the end, for which their type has no room.
    assert {part["finish_reason"] for part in parts} == {None}
    parts = [*({**part, "finish_reason": "stop"} for part in parts), last]
    parts = [read(Completion, completion_chunk(about, [part])).choices[0] for part in parts]
    whole = read(Completion, completion(about, [choice], usage([(0, END)]))).choices[0]
    assert "".join(part.text for part in parts) == whole.text == "a€b"
    logprobs = [part.logprobs for part in parts if part.logprobs]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [one for part in logprobs for one in getattr(part, name)] == getattr(
            whole.logprobs, name
        )
    assert whole.logprobs.text_offset == [0, 1, 1, 1, 2]
    assert whole.logprobs.tokens == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert whole.logprobs.top_logprobs[0]["a"] == -1.0
    assert LEAST in whole.logprobs.top_logprobs[0].values()
    assert (whole.index, whole.finish_reason, parts[-1].finish_reason) == (1, "stop", "stop")


def test_an_echo_comes_first_and_once(spelled):
    pieces = [Piece("c"), Piece("d")]
    choice = TextChoice(0, "ab")
    assert "".join(part["text"] for part in streamed(choice, pieces)) == "abcd"
    assert choice.whole()["text"] == "abcd"
    whole = TextChoice(0, "ab")
    for piece in pieces:
        whole.piece(piece)
    whole.end(END)
    assert whole.whole()["text"] == "abcd" and TextChoice(0).first() is None


def test_a_fault_of_ours_is_no_fault_of_the_request():
    ours, theirs = of_fault(Fault("broke")), of_fault(Fault("empty", ours=False))
    assert (ours.status, theirs.status) == (503, 400)
    assert error_body(ours)["error"] == {
        "message": "broke",
        "type": "server_error",
        "param": None,
        "code": "engine_fault",
    }
