import pytest

from mlxlora.data.formats import RowFault, parse

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.mark.parametrize(
    "row, kind, said",
    [
        (CHAT, "chat", [("user", "hi"), ("assistant", "ho")]),
        ({"prompt": "hi", "completion": "ho"}, "completion", [("user", "hi"), ("assistant", "ho")]),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            "completion",
            [("user", "add\n\n1 2"), ("assistant", "3")],
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            "chat",
            [("user", "hi"), ("assistant", "ho")],
        ),
        ({"text": "plain"}, "text", []),
    ],
)
def test_every_row_format_is_read(row, kind, said):
    record = parse(row, {})
    assert record.kind == kind
    assert [(m["role"], m["content"]) for m in record.messages] == said


def test_tools_and_tool_calls_reach_the_template_as_objects():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    record = parse(row, {})
    assert record.tools and record.tools[0]["function"]["name"] == "f"
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_columns_rename_keys():
    record = parse({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"})
    assert record.messages[1]["content"] == "a"


def test_unknown_keys_are_named_with_the_option_that_helps():
    with pytest.raises(RowFault) as fault:
        parse({"question": "q", "answer": "a"}, {})
    assert "'question', 'answer'" in str(fault.value)
    assert "data.columns.prompt=question" in str(fault.value)


@pytest.mark.parametrize(
    "row, says",
    [
        ([1], "must be a JSON object, this is a list"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant turn"),
        ({"messages": [{"content": "hi"}]}, "message 1 has no 'role'"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text, this is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "part of type 'text'"),
        ({"prompt": "x"}, "'completion' is missing"),
        ({"prompt": "x", "completion": None}, "'completion' is missing"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "preference"),
        ({"text": {"a": 1}}, "'text' must be text, this is an object"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, says):
    with pytest.raises(RowFault, match=says.replace("(", r"\(")):
        parse(row, {})


def test_nulls_are_absent_keys():
    row = {
        "prompt": None,
        "messages": [
            {"role": "user", "content": "go", "tool_calls": None},
            {"role": "assistant", "content": "ok", "name": None},
        ],
    }
    assert parse(row, {}).messages[1] == {"role": "assistant", "content": "ok"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "output": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        CHAT,
    ],
)
def test_a_system_prompt_beside_the_turns_comes_first(row):
    record = parse({**row, "system": "be kind"}, {})
    assert record.messages[0] == {"role": "system", "content": "be kind"}
    assert len(record.messages) == 3
