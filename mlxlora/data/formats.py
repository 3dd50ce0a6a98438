"""One parsed JSON value -> Record, whatever the row's format.

Tools and tool calls are kept as chat templates want them. Files and lines are not known here;
tokens neither.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

Row = dict[str, Any]
Message = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}
_FORMATS_TEXT = (
    '{"messages": [{"role", "content"}]}, {"prompt", "completion"}, {"text"}, '
    '{"instruction", "input"?, "output"}, {"conversations": [{"from", "value"}]}'
)


@dataclass(frozen=True)
class Record:
    """One row, whatever its format was: a conversation or plain text."""

    row: int  # 0-based position in its file, blank and skipped lines not counted
    kind: Literal["chat", "completion", "text"]
    messages: tuple[Message, ...] = ()  # chat and completion
    text: str = ""  # text
    tools: tuple[Row, ...] | None = None


class RowFault(Exception):
    """Why a row cannot be used; the file and line are added where they are known."""


def parse(row: Any, columns: Mapping[str, str]) -> Record:
    """The record in a parsed JSON value. columns renames keys: {our name: the row's name}.

    Raises RowFault naming what is wrong and, for unknown keys, which keys were found.
    """
    return parse_named(row, columns)[1]


def parse_named(row: Any, columns: Mapping[str, str]) -> tuple[str, Record]:
    """parse(), and the name of the row's format: the key in READERS that told it."""
    if not isinstance(row, dict):
        raise RowFault(f"a row must be a JSON object, this is {_json_kind(row)}")
    row = {key: value for key, value in row.items() if value is not None}  # exports write nulls
    if columns:
        row = {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}
    for key, reader in READERS.items():
        if key in row:
            if "chosen" in row:
                raise RowFault("rows with 'chosen' are preference pairs, not yet trained on")
            return key, reader(row)
    raise RowFault(_unknown_keys(row))


def _messages(row: Row) -> Record:
    return _conversation(row, row["messages"], "role", "content")


def _conversations(row: Row) -> Record:
    return _conversation(row, row["conversations"], "from", "value")


def _completion(row: Row) -> Record:
    return _pair(row, _text(row, "prompt"), _text(row, "completion"))


def _instruction(row: Row) -> Record:
    instruction, extra = _text(row, "instruction"), row.get("input") or ""
    if not isinstance(extra, str):
        raise RowFault(f"'input' must be text, this is {_json_kind(extra)}")
    prompt = f"{instruction}\n\n{extra}" if extra else instruction
    return _pair(row, prompt, _text(row, "output"))


def _plain_text(row: Row) -> Record:
    return Record(row=-1, kind="text", text=_text(row, "text"))


# A new row format is one function and one line: the key that tells it -> its reader.
READERS: dict[str, Callable[[Row], Record]] = {
    "messages": _messages,
    "conversations": _conversations,
    "prompt": _completion,
    "instruction": _instruction,
    "text": _plain_text,
}


def _pair(row: Row, prompt: str, completion: str) -> Record:
    messages = (
        *_system(row),
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    )
    return Record(row=-1, kind="completion", messages=messages)


def _system(row: Row) -> tuple[Message, ...]:
    """A system prompt that stands beside the turns, as some exports have it."""
    system = _text(row, "system") if "system" in row else ""
    return ({"role": "system", "content": system},) if system else ()


def _conversation(row: Row, turns: Any, role_key: str, content_key: str) -> Record:
    tools = row.get("tools")
    if not isinstance(turns, list) or not turns:
        raise RowFault("the conversation must be a list with at least one message")
    if tools is not None and not isinstance(tools, list):
        raise RowFault(f"'tools' must be a list, this is {_json_kind(tools)}")
    messages = tuple(
        _message(turn, role_key, content_key, number) for number, turn in enumerate(turns, 1)
    )
    if messages[0]["role"] != "system":
        messages = (*_system(row), *messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowFault("no assistant turn, so there is nothing to train on")
    return Record(row=-1, kind="chat", messages=messages, tools=tuple(tools) if tools else None)


def _message(turn: Any, role_key: str, content_key: str, number: int) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
        raise RowFault(f"message {number} has no '{role_key}'")
    role = _ROLES.get(turn[role_key], turn[role_key])
    content = turn.get(content_key)
    if isinstance(content, list):  # content parts: only text can be trained on here
        content = "".join(_part(part, number) for part in content)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise RowFault(
            f"message {number} ({str(role)[:20]}): '{content_key}' must be text, "
            f"this is {_json_kind(content)}"
        )
    rest = {k: v for k, v in turn.items() if k not in (role_key, content_key) and v is not None}
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], number)
    return {**rest, "role": role, "content": content}


def _tool_calls(calls: Any, number: int) -> list[Row]:
    """OpenAI writes arguments as JSON text; chat templates want the object itself."""
    if not isinstance(calls, list):
        raise RowFault(f"message {number}: 'tool_calls' must be a list")
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault(f"message {number}: a tool call needs a function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = orjson.loads(arguments or "{}")
            except orjson.JSONDecodeError as error:
                raise RowFault(f"message {number}: tool call arguments: {error}") from error
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed


def _part(part: Any, number: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else _json_kind(part)
    raise RowFault(
        f"message {number} holds a part of type {_short(kind)}; only text can be trained"
    )


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        raise RowFault(f"'{key}' is missing; the row has {_names(row)}")
    if not isinstance(value, str):
        raise RowFault(f"'{key}' must be text, this is {_json_kind(value)}")
    return value


def _unknown_keys(row: Row) -> str:
    texts = [key for key, value in row.items() if isinstance(value, str)]
    example = dict(zip(("prompt", "completion"), texts, strict=False))
    if len(texts) == 1:
        example = {"text": texts[0]}
    names = example.items()
    hint = " ".join(f"--set data.columns.{ours}={theirs[:40]}" for ours, theirs in names)
    return f"no known row format in the keys {_names(row)}. Known: {_FORMATS_TEXT}." + (
        f" Name the columns, for example: {hint}" if hint else ""
    )


def _names(row: Row) -> str:
    return ", ".join(_short(key) for key in itertools.islice(row, 12)) or "(none)"


def _short(value: Any) -> str:
    """What a row holds, in a message: quoted and cut off."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true/false"}
    return kinds.get(type(value), "null" if value is None else "a number")
