"""An answer's text as what it is: content, reasoning and calls of tools, as it comes in.

mlx-lm's machine knows by which marks a model parts them, and its parsers how it writes calls.
A call that is cut short or cannot be read becomes content: nothing that was said vanishes.
Blanks at the seams are dropped.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex
from types import SimpleNamespace
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

NORMAL, REASONING, TOOL = "normal", "reasoning", "tool"  # mlx-lm's names of its states


@dataclass(frozen=True)
class Manner:
    """How an answer is to be understood.

    thinking: the prompt ends within a thought. tools: those it may call, as parsers read them.
    held: a grammar holds it, so marks within it are words. calls: it is one call and nothing else,
    as a JSON object. several: it may call more than once.
    """

    thinking: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    held: bool = False
    calls: bool = False
    several: bool = True


@dataclass(frozen=True)
class Call:
    """A call of a tool; arguments are a JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Said:
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class Speech:
    """feed() an answer's text, then end() it."""

    def __init__(
        self,
        tokenizer: Any,
        manner: Manner | None = None,
        read: Callable[..., Any] | None = None,
    ) -> None:
        """read: how a text is read as calls (serve/calls/); None: by the tokenizer's parser."""
        self._tokenizer = tokenizer
        self.manner = manner or Manner()
        self._parser = _json if self.manner.calls else read or tokenizer.tool_parser
        self.called = 0
        native = bool(self.manner.tools) and not self.manner.calls
        self._listens = native and tokenizer.has_tool_calling
        machine = make_text_state_machine(tokenizer if self._listens else _without_calls(tokenizer))
        first = REASONING if self.manner.thinking else NORMAL
        self._place = tokenizer.response_initial_state or first
        self._state = machine.make_state(self._place)
        self._call: str | None = "" if self.manner.calls else None
        self._content = _Words(holds=self._listens)
        self._thoughts = _Words(holds=True, begins=True)

    def feed(self, text: str) -> Said:
        """What is certain now."""
        if self._within_held():
            return self._told([(self._place, text)])
        self._state, segments = TextStateMachine.split(self._state, text)
        return self._told(segments)

    def end(self) -> Said:
        """What was held back."""
        self._state, rest, place = TextStateMachine.flush(self._state)
        said = self._told([(place, rest)])
        calls, content = said.calls, said.content
        if self._call is not None:
            more, words = self._read(self._call)
            calls, content, self._call = calls + more, content + words, None
        if not self.called:
            content += self._content.rest()
        return Said(content, said.reasoning, calls)

    def reason(self, reason: str) -> str:
        """The finish_reason for an End's."""
        return "tool_calls" if self.called and reason == "stop" else reason

    def _within_held(self) -> bool:
        """Whether it has come to what the grammar holds, where marks are words."""
        if not self.manner.held or self._listens:  # a call that is held has its marks before it
            return self.manner.held and self._place == TOOL
        begun = self._content.any or bool((self._call or "").strip())
        return self._place == NORMAL and (begun or not self._tokenizer.has_thinking)

    def _told(self, segments: list[tuple[str, str]]) -> Said:
        content, reasoning = "", ""
        calls: tuple[Call, ...] = ()
        for place, text in segments:
            if place != self._place:
                more, words = self._move(place)
                content, calls = content + words, calls + more
            if place == REASONING:
                reasoning += self._thoughts.add(text)
            elif place == TOOL or (place == NORMAL and self.manner.calls):
                self._call = (self._call or "") + text
            elif place == NORMAL:
                content += self._content.add(text)
        return Said(content, reasoning, calls)

    def _move(self, place: str) -> tuple[tuple[Call, ...], str]:
        """To another state; what the call that ends here is, as calls or as words."""
        was, self._place = self._place, place
        if was == REASONING:
            self._content.begin()
            self._thoughts.begin()
        if place == TOOL:
            self._call = ""
        if was != TOOL or self._call is None:
            return (), ""
        text, self._call = self._call, None
        return self._read(text, self._tokenizer.tool_call_end)

    def _read(self, text: str, end: str = "") -> tuple[tuple[Call, ...], str]:
        """The calls that a text makes; or the text with its marks, if it makes none."""
        native = not self.manner.calls
        calls = _calls(self._parser, text, self.manner.tools)
        if calls is None:
            start = self._tokenizer.tool_call_start if native else ""
            return (), self._content.add(f"{start}{text}{end}")
        if not self.manner.several:
            calls = calls[: max(0, 1 - self.called)]
        self.called += len(calls)
        self._content.begin()
        return tuple(calls), ""


class _Words:
    """Text without the blanks at its seams: those at its beginning, and those before a call."""

    def __init__(self, *, holds: bool, begins: bool = False) -> None:
        self._holds, self._begins = holds, begins
        self._blank = ""
        self.any = False

    def begin(self) -> None:
        self._begins, self._blank = True, ""

    def add(self, text: str) -> str:
        if self._begins:
            text = text.lstrip()
            self._begins = not text
        text = self._blank + text
        said = text.rstrip() if self._holds else text
        self._blank = text[len(said) :]
        self.any = self.any or bool(said.strip())
        return said

    def rest(self) -> str:
        return self._blank


def _calls(parser: Callable[..., Any], text: str, tools: tuple[Any, ...]) -> list[Call] | None:
    try:
        found = parser(text, list(tools))
        return [_call(one) for one in (found if isinstance(found, list) else [found])] or None
    except Exception:  # sixteen parsers of what a model wrote raise what they like
        return None


def _json(text: str, _: Any) -> Any:
    return json.loads(text)


def _call(found: Any) -> Call:
    """Raises ValueError, KeyError or TypeError for what is no call."""
    name, arguments = found["name"], found["arguments"]
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    name.encode()
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, dict):
        raise ValueError("arguments that are no object")
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        written.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which can be written as an escape only
        written = json.dumps(arguments, allow_nan=False)
    own = found.get("id")
    ours = f"call_{token_hex(12)}"
    return Call(own if isinstance(own, str) and own.isascii() and own else ours, name, written)


def _without_calls(tokenizer: Any) -> Any:
    """What mlx-lm's machine asks of a tokenizer, for one whose calls are words."""
    transitions = {
        place: [edge for edge in edges if edge[1] != TOOL]
        for place, edges in tokenizer.response_transitions.items()
    }
    return SimpleNamespace(
        has_thinking=tokenizer.has_thinking,
        think_start=tokenizer.think_start,
        think_end=tokenizer.think_end,
        has_tool_calling=False,
        structural_markers=tokenizer.structural_markers,
        response_transitions=transitions,
    )
