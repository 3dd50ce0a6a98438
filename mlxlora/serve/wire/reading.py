"""The bytes of a body as a JSON object, strictly: what it says is said once, and can be written.

Python's reader takes NaN, repeated names and half a surrogate pair; a template or a grammar
would fall over them later, or act on one of two meanings. Nothing but WireError is raised.
"""

import json
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from mlxlora.serve.wire.refusals import WireError, bad_field

DEPTH = 64  # of objects and lists in each other
MOST_VALUES = 500_000  # as its commas and brackets tell, those in texts too
MOST_CONTAINERS = 50_000  # objects and lists
_HALVES = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")  # only so can half a pair be written


def read_object(body: bytes | bytearray) -> dict[str, Any]:
    """Raises WireError (400) for anything that is not one well-formed JSON object."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise bad_field(None, f"the body holds more than {MOST_VALUES:,} values; shorten it")
    try:
        text = bytes(body).decode("utf-8-sig")
        value = read_json(text)
    except UnicodeDecodeError as error:
        raise bad_field(None, f"the body is not UTF-8 text (byte {error.start + 1})") from None
    except ValueError as error:
        raise bad_field(None, f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_field(None, "the body must be a JSON object")
    path = half_pair(value) if _ESCAPED.search(text) else None
    if path is not None:
        raise bad_field(path or None, "it holds half a surrogate pair, which is no text")
    return value


def read_json(text: str) -> Any:
    """Any JSON value. Raises ValueError with a reason, WireError for a field given twice."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_once,
            parse_float=_finite,
            parse_constant=_constant,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_shape(value)
    return value


def half_pair(value: Any) -> str | None:
    """The path of the first text with half a surrogate pair; None if there is none."""
    if isinstance(value, str):
        return "" if _HALVES.search(value) else None
    names: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        if any(_HALVES.search(name) for name in value):
            return ""
        names = value.items()
    elif isinstance(value, list):
        names = enumerate(value)
    for name, inner in names:
        path = half_pair(inner)
        if path is not None:
            return f"{name}.{path}" if path else str(name)
    return None


_TOO_DEEP = f"objects and lists are more than {DEPTH} deep"


def _check_shape(value: Any) -> None:
    """Raise ValueError for what is too deep, or in too many pieces, to be looked into."""
    level = [value] if isinstance(value, dict | list) else []
    count = 0
    for _ in range(DEPTH):
        count += len(level)
        if count > MOST_CONTAINERS:
            raise ValueError(f"it holds more than {MOST_CONTAINERS:,} objects and lists")
        values = (one.values() if isinstance(one, dict) else one for one in level)
        level = [v for inner in values for v in inner if isinstance(v, dict | list)]
    if level:
        raise ValueError(_TOO_DEEP)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            shown = _HALVES.sub("?", name[:100])
            raise WireError(400, f"{shown}: this field is given twice", param=shown)
        found[name] = value
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")
