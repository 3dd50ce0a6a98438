"""From requests to orders: rendering, limits, seeds, what a grammar holds."""

import json

import pytest
from conftest import CHATML
from marks import OPENED, TOOLS, VOCABULARY, marked
from test_serve_grammar import POINT, read

from mlxlora.serve.grammar.following import Grammars
from mlxlora.serve.orders import Sampling
from mlxlora.serve.wire.model import Defaults, Model
from mlxlora.serve.wire.prompts import chat, check, completion
from mlxlora.serve.wire.refusals import WireError
from mlxlora.serve.wire.requests import ChatRequest, CompletionRequest, parse
from mlxlora.serve.wire.speech import Manner, Speech

TURNS = [{"role": "user", "content": "hi"}]
ADD = {"name": "add", "description": "adds", "parameters": POINT}
TOOL = {"type": "function", "function": ADD}
OTHER = {"type": "function", "function": {"name": "other"}}
ADDED = '{"name": "add", "arguments": {"x":1,"y":"up"}}'


def model(directory, template=TOOLS, context=512, **changed):
    directory.mkdir(exist_ok=True)
    tokenizer = marked(directory, template)
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    return Model(tokenizer, context, Grammars(tokenizer))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return model(tmp_path_factory.mktemp("served"))


def asked(served, **fields):
    body = {"model": "m", "messages": TURNS, **fields}
    made = chat(parse(json.dumps(body).encode(), ChatRequest), served, "mine")
    check(made, served)
    return made


def continued(served, prompt="ab", **fields):
    body = {"model": "m", "prompt": prompt, **fields}
    return completion(parse(json.dumps(body).encode(), CompletionRequest), served)


def refused(served, call=asked, **fields):
    with pytest.raises(WireError) as error:
        call(served, **fields)
    assert error.value.status == 400
    return error.value.param


def test_a_chat_is_rendered_by_the_template(served):
    (order,) = asked(served).orders
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert served.tokenizer.decode(list(order.prompt)) == text
    assert (order.adapter, order.top, order.grammar, order.stops) == ("mine", None, None, ())
    assert order.sampling == Sampling() and order.max_tokens == 512 - len(order.prompt)


def test_what_a_request_says_goes_before_the_defaults(served):
    said = {"temperature": 0.5, "top_p": 0.9, "top_k": 10**6, "min_p": 0.1, "seed": -3}
    said |= {"repetition_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": -1}
    (order,) = asked(
        served, **said, logit_bias={"7": 3}, max_tokens=9, max_completion_tokens=5, stop="x"
    ).orders
    assert order.sampling == Sampling(
        0.5, 0.9, VOCABULARY, 0.1, -3 % (1 << 64), 1.0, -1.0, 1.2, ((7, 3.0),)
    )
    assert order.max_tokens == 5 and order.stops == ("x",)
    warm = Model(served.tokenizer, 512, served.grammars, Defaults(temperature=0.7, max_tokens=3))
    assert asked(warm).orders[0].sampling.temperature == 0.7
    assert asked(warm, temperature=0).orders[0].sampling.temperature == 0
    assert asked(warm).orders[0].max_tokens == 3


def test_choices_have_seeds_of_their_own_which_follow_from_the_request(served):
    seeds = [order.sampling.seed for order in asked(served, n=3, seed=5).orders]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    assert seeds == [order.sampling.seed for order in asked(served, n=3, seed=5).orders]
    assert [order.sampling.seed for order in asked(served, n=2).orders] == [None, None]


def test_log_probabilities_only_if_asked_for(served):
    assert asked(served, logprobs=True).orders[0].top == 0
    assert asked(served, logprobs=True, top_logprobs=4).orders[0].top == 4
    assert continued(served, logprobs=2).orders[0].top == 2


def test_a_prompt_that_fills_the_context_is_refused(served):
    long = [{"role": "user", "content": "a" * 600}]
    with pytest.raises(WireError, match="shorten") as error:
        asked(served, messages=long)
    assert (error.value.param, error.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(WireError) as error:
        continued(served, prompt=["a", "a" * 512])
    assert (error.value.param, error.value.code) == ("prompt.1", "context_length_exceeded")
    assert continued(served, prompt="a" * 511, max_tokens=99).orders[0].max_tokens == 1


def test_tokens_that_the_model_has_not_are_refused(served):
    assert refused(served, logit_bias={str(VOCABULARY): 1}) == "logit_bias"
    assert refused(served, continued, prompt=[VOCABULARY]) == "prompt"
    assert refused(served, continued, prompt=[[1], [-1]]) == "prompt.1"


def test_what_a_template_refuses_is_the_messages(tmp_path):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    served = model(tmp_path, strict)
    with pytest.raises(WireError, match="no system") as error:
        asked(served, messages=[{"role": "system", "content": "a"}])
    assert error.value.param == "messages"
    assert refused(model(tmp_path / "none", None)) == "messages"


def test_every_prompt_has_its_choices(served):
    asked = continued(served, prompt=["a", "c"], n=2, echo=True)
    assert [served.tokenizer.decode(list(o.prompt)) for o in asked.orders] == ["a", "a", "c", "c"]
    assert (asked.prompts, asked.echoes) == ((0, 0, 1, 1), ("a", "a", "c", "c"))
    assert all(order.max_tokens == 16 for order in asked.orders)
    assert continued(served, prompt=[[1], [2]]).orders[1].prompt == (2,)
    assert refused(served, continued, prompt=["a"] * 40, n=4) == "prompt"


def test_thinking_follows_from_the_end_of_the_prompt(served, tmp_path):
    assert asked(served).manner == Manner()
    opened = model(tmp_path, OPENED)
    assert asked(opened).manner.thinking
    marks = [{"role": "user", "content": "what does <think> mean"}]
    assert not asked(served, messages=marks).manner.thinking
    none = {"messages": marks, "response_format": {"type": "json_object"}}
    for off in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        (order,) = asked(served, **none, **off).orders
        assert served.tokenizer.decode(list(order.prompt)).endswith("<think>\n\n</think>\n\n")
        assert read(served.grammars, order.grammar, served.tokenizer, "<think>")[0] == ""


@pytest.mark.parametrize("schema", [None, POINT])
def test_a_response_format_holds_the_answer(served, schema):
    form = {"type": "json_object"}
    if schema:
        form = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}
    made = asked(served, response_format=form)
    assert made.manner.held and not made.manner.calls
    whole = '{"x":1,"y":"up"}'
    held = read(served.grammars, made.orders[0].grammar, served.tokenizer, whole)
    assert held == (whole, True)
    assert asked(served, response_format={"type": "text"}).orders[0].grammar is None


def test_a_schema_that_cannot_be_followed_names_its_field(served):
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": {"type": "nothing"}}}
    assert refused(served, response_format=form) == "response_format"
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": 3}}}
    assert refused(served, tools=[TOOL, bad], tool_choice="required") == "tools"


def test_tools_stand_in_the_prompt_unless_none_may_be_called(served):
    told = asked(served, tools=[TOOL])
    assert '"adds"' in served.tokenizer.decode(list(told.orders[0].prompt))
    assert told.orders[0].grammar is None and told.manner.tools[0]["function"]["name"] == "add"
    assert asked(served, tools=[TOOL], tool_choice="none") == asked(served)
    assert not asked(served, tools=[TOOL], parallel_tool_calls=False).manner.several


@pytest.mark.parametrize("kind", ["array", ["object", "null"], None])
def test_arguments_are_an_object_whatever_their_schema_says(served, kind):
    function = {"name": "f", "parameters": {"type": kind, "items": {"type": "integer"}}}
    made = asked(served, tools=[{"type": "function", "function": function}], tool_choice="required")
    assert made.manner.tools[0]["function"]["parameters"]["type"] == "object"
    grammar = json.loads(made.orders[0].grammar)["grammars"][1]
    assert grammar["json_schema"]["type"] == "object"


NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("template", [TOOLS, OPENED])
def test_a_call_that_is_required_is_held_and_heard(tmp_path, choice, native, template):
    served = model(tmp_path, template)
    if not native:
        served.tokenizer._tool_parser = served.tokenizer._tool_call_start = None
    made = asked(served, tools=[OTHER, TOOL], tool_choice=choice)
    opening = "<tool_call>\n" if native else ""
    thought = "hm</think>\n\n" if template is OPENED else ""
    whole = f"{thought}{opening}{ADDED}"
    assert read(served.grammars, made.orders[0].grammar, served.tokenizer, whole) == (whole, True)
    other = whole.replace("add", "other", 1)
    admitted = read(served.grammars, made.orders[0].grammar, served.tokenizer, other)[0]
    assert ("other" in admitted) == (choice == "required")
    speech = Speech(served.tokenizer, made.manner)
    said = [speech.feed(letter) for letter in whole] + [speech.end()]
    (call,) = [call for one in said for call in one.calls]
    assert call.name == "add" and json.loads(call.arguments) == {"x": 1, "y": "up"}
    assert speech.reason("stop") == "tool_calls"
    assert "".join(one.content for one in said) == ""


def test_tools_that_cannot_be_told_or_heard_are_refused(tmp_path, served):
    assert refused(model(tmp_path, CHATML), tools=[TOOL]) == "tools"
    deaf = model(tmp_path / "deaf")
    deaf.tokenizer._tool_parser = deaf.tokenizer._tool_call_start = None
    assert refused(deaf, tools=[TOOL]) == "tools"
    both = {"tools": [TOOL], "response_format": {"type": "json_object"}}
    assert refused(served, **both) == "response_format"
    assert asked(served, **both, tool_choice="none").orders[0].grammar is not None


def test_a_text_far_beyond_the_context_is_refused_before_it_is_cut_into_tokens(served, monkeypatch):
    monkeypatch.setattr(type(served.tokenizer), "apply_chat_template", None)
    long = "a" * (64 * served.context + 1)
    with pytest.raises(WireError) as error:
        asked(served, messages=[{"role": "user", "content": long}])
    assert error.value.code == "context_length_exceeded"
    assert refused(served, continued, prompt=long) == "prompt"
