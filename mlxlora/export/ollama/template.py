"""The part of Go's text/template that exports write, evaluated.

Known are text, fields, variables, string constants, if / else if / else, range with two
variables, define and template, and the functions and, or, not, eq, ne, len and slice. Anything
else, and the trimming of space around an action, is refused, never guessed at: what is written
is evaluated here before a user gets it. Strings are bytes, as in Go. The language is described
at pkg.go.dev/text/template.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

DEEPEST = 100  # templates that call themselves; Go allows 100,000
_TOKEN = re.compile(
    r'\s+|:=|=|[(),|]|"(?:\\.|[^"\\])*"|\d+|\$?(?:\.?[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)|\$|\.'
)
_ESCAPE = re.compile(r'\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[abfnrtv\\"])')
_NAMED = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92, '"': 34}


class GoTemplateError(Exception):
    """A template outside of the part that is known, or one that fails."""


# --- what a template consists of ---------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    function: str
    arguments: list[Any]


@dataclass(frozen=True)
class _Path:
    root: str  # "" for the dot, else a variable's name
    names: list[str]


@dataclass
class _Text:
    text: bytes


@dataclass
class _Show:
    value: Any


@dataclass
class _Set:
    name: str
    value: Any
    new: bool


@dataclass
class _If:
    condition: Any
    then: list[Any] = field(default_factory=list)
    otherwise: list[Any] = field(default_factory=list)


@dataclass
class _Range:
    index: str
    item: str
    values: Any
    body: list[Any] = field(default_factory=list)


@dataclass
class _Use:
    name: str
    value: Any


class GoTemplate:
    """A template, ready to be executed."""

    def __init__(self, text: str) -> None:
        """Raises GoTemplateError for what is not of the part that is known."""
        self._defined: dict[str, list[Any]] = {}
        self._pieces = list(_pieces(text))
        self._place = 0
        self._root, _ = self._block(())

    def execute(self, data: dict[str, Any]) -> str:
        """The text for data: strings, numbers, truth values, lists and dictionaries of them.

        Raises GoTemplateError where Go would fail, or would write "<no value>".
        """
        out: list[bytes] = []
        dot = _bytes(data)
        _Run(self._defined, out).block(self._root, dot, {"$": dot}, 0)
        return b"".join(out).decode()

    def _block(self, closing: tuple[str, ...]) -> tuple[list[Any], list[str]]:
        """Nodes up to one of the closing words, and the action that closed them."""
        nodes: list[Any] = []
        while self._place < len(self._pieces):
            piece = self._pieces[self._place]
            self._place += 1
            if isinstance(piece, bytes):
                nodes.append(_Text(piece))
            elif piece[0] in closing:
                return nodes, piece
            elif piece[0] == "define":
                body, _ = self._block(("end",))
                self._defined[_string(piece[1]).decode()] = body
            else:
                nodes.append(self._action(piece))
        if closing:
            raise GoTemplateError(f"no {' or '.join(closing)}")
        return nodes, []

    def _action(self, tokens: list[str]) -> Any:
        first = tokens[0]
        if first == "if":
            return self._if(tokens)
        if first == "range":
            if len(tokens) < 6 or tokens[2] != "," or tokens[4] != ":=":
                raise GoTemplateError("range wants two variables")
            loop = _Range(tokens[1], tokens[3], _expression(tokens[5:]))
            loop.body, _ = self._block(("end",))
            return loop
        if first == "template":
            return _Use(_string(tokens[1]).decode(), _expression(tokens[2:]))
        if len(tokens) > 2 and tokens[1] in (":=", "="):
            return _Set(first, _expression(tokens[2:]), tokens[1] == ":=")
        if first in ("else", "end"):
            raise GoTemplateError(f"{first} closes nothing")
        return _Show(_expression(tokens))

    def _if(self, tokens: list[str]) -> _If:
        node = _If(_expression(tokens[1:]))
        node.then, closed = self._block(("else", "end"))
        if closed[:2] == ["else", "if"]:
            node.otherwise = [self._if(closed[1:])]
        elif closed == ["else"]:
            node.otherwise, _ = self._block(("end",))
        return node


def _pieces(text: str) -> Iterator[bytes | list[str]]:
    """Text and actions in turn; an action is the list of its tokens."""
    place = 0
    while (start := text.find("{{", place)) >= 0:
        if start > place:
            yield text[place:start].encode()
        tokens, place = [], start + 2
        while not text.startswith("}}", place):
            found = _TOKEN.match(text, place)
            if found is None:
                raise GoTemplateError(f"not understood: {text[place : place + 20]!r}")
            if not found.group().isspace():
                tokens.append(found.group())
            place = found.end()
        if not tokens:
            raise GoTemplateError("an action without words")
        yield tokens
        place += 2
    if place < len(text):
        yield text[place:].encode()


def _expression(tokens: list[str]) -> Any:
    value, rest = _call(list(tokens))
    if rest:
        raise GoTemplateError(f"not understood: {' '.join(rest)}")
    return value


def _call(tokens: list[str]) -> tuple[Any, list[str]]:
    """One command, up to the end or a closing parenthesis."""
    if not tokens:
        raise GoTemplateError("an expression without words")
    if tokens[0] not in FUNCTIONS and tokens[0] not in ("and", "or"):
        return _operand(tokens)
    function, tokens = tokens[0], tokens[1:]
    arguments = []
    while tokens and tokens[0] != ")":
        argument, tokens = _operand(tokens)
        arguments.append(argument)
    return _Call(function, arguments), tokens


def _operand(tokens: list[str]) -> tuple[Any, list[str]]:
    first, rest = tokens[0], tokens[1:]
    if first == "(":
        value, rest = _call(rest)
        if not rest or rest[0] != ")":
            raise GoTemplateError("a parenthesis that is not closed")
        return value, rest[1:]
    if first[0] == '"':
        return _string(first), rest
    if first.isdigit():
        return int(first), rest
    if first in ("true", "false"):
        return first == "true", rest
    if first[0] in "$.":
        root, *names = first.split(".")
        return _Path(root, [name for name in names if name]), rest
    raise GoTemplateError(f"not understood: {first}")


def _string(token: str) -> bytes:
    """The bytes that a quoted constant stands for."""

    def one(found: re.Match[str]) -> str:
        escape = found.group(1)
        code = _NAMED[escape] if escape in _NAMED else int(escape[1:], 16)
        if escape[0] == "x" and code > 0x7F:
            raise GoTemplateError("\\x beyond 7f")
        return chr(code)

    if token[:1] != '"':
        raise GoTemplateError(f"not a constant: {token}")
    return _ESCAPE.sub(one, token[1:-1]).encode()


# --- what it does ------------------------------------------------------------------------------


def _slice(value: Any, start: int = 0, end: int | None = None) -> Any:
    end = len(value) if end is None else end
    if not 0 <= start <= end <= len(value):
        raise GoTemplateError(f"slice {start}:{end} of {len(value)}")
    return value[start:end]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "not": lambda value: not value,
    "eq": lambda first, *others: first in others,
    "ne": lambda first, second: first != second,
    "len": len,
    "slice": _slice,
}


class _Run:
    """One execution. A variable is seen from where it is declared to the end of its block."""

    def __init__(self, defined: dict[str, list[Any]], out: list[bytes]) -> None:
        self.defined, self.out = defined, out

    def block(self, nodes: list[Any], dot: Any, names: dict[str, Any], depth: int) -> None:
        """names: of variables to boxes of one value each, so that inner blocks set outer ones."""
        names = dict(names)
        for node in nodes:
            self._node(node, dot, names, depth)

    def _node(self, node: Any, dot: Any, names: dict[str, Any], depth: int) -> None:
        match node:
            case _Text(text):
                self.out.append(text)
            case _Show(value):
                shown = self._value(value, dot, names)
                if not isinstance(shown, bytes):
                    raise GoTemplateError(f"{type(shown).__name__} is not text")
                self.out.append(shown)
            case _Set(name, value, new):
                if new:
                    names[name] = [None]
                names[name][0] = self._value(value, dot, names)
            case _If(condition, then, otherwise):
                taken = then if self._value(condition, dot, names) else otherwise
                self.block(taken, dot, names, depth)
            case _Range(index, item, values, body):
                for number, value in enumerate(self._value(values, dot, names)):
                    inner = {**names, index: [number], item: [value]}
                    self.block(body, value, inner, depth)
            case _Use(name, value):
                if depth > DEEPEST:
                    raise GoTemplateError(f"template {name} is called too deeply")
                inside = self._value(value, dot, names)
                self.block(self.defined[name], inside, {"$": inside}, depth + 1)

    def _value(self, value: Any, dot: Any, names: dict[str, Any]) -> Any:
        if isinstance(value, _Path):
            return _follow(value, dot, names)
        if not isinstance(value, _Call):
            return value
        if value.function in ("and", "or"):
            result = None
            for argument in value.arguments:  # only as far as needed
                result = self._value(argument, dot, names)
                if bool(result) == (value.function == "or"):
                    break
            return result
        return FUNCTIONS[value.function](*(self._value(a, dot, names) for a in value.arguments))


def _follow(path: _Path, dot: Any, names: dict[str, Any]) -> Any:
    if not path.root:
        value = dot
    elif path.root == "$":
        value = names["$"]
    elif path.root in names:
        value = names[path.root][0]
    else:
        raise GoTemplateError(f"no variable {path.root}")
    for name in path.names:
        if not isinstance(value, dict) or name not in value:
            raise GoTemplateError(f"no field .{name}")
        value = value[name]
    return value


def _bytes(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, dict):
        return {key: _bytes(inner) for key, inner in value.items()}
    return [_bytes(inner) for inner in value] if isinstance(value, list) else value
