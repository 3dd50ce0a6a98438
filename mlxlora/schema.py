"""Frozen dataclasses from TOML and "key=value" overrides, strictly; and back to TOML.

A field is made by option(), which carries its help, unit and limit. Faults are collected,
each with its dotted key and, for a wrong name, the nearest right one.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from mlxlora.errors import ConfigError
from mlxlora.readers import expanded, read_text

LARGEST = 1 << 53  # of whole numbers: what every language and JSON reader keeps exactly
Check = Callable[[Any], bool]


def option(
    default: Any,
    help: str,
    unit: str = "",
    check: Check | None = None,
    says: str = "",
    flag: bool = False,
) -> Any:
    """A dataclass field that carries its own help, unit and limit.

    check(value) tells whether the value is possible and says names what it must be;
    flag=True also makes it an option of the command line (data.max_length -> --max-length).
    """
    metadata = {"help": help, "unit": unit, "check": check, "says": says, "flag": flag}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def options(config: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, type, dataclass field) of every option, tables included."""
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from options(typing.cast(type, kind), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, kind, item


def nearest(name: str, valid: Iterable[str]) -> str:
    """' (did you mean X?)' for the most similar valid name, or ''."""
    names = list(valid)
    found = difflib.get_close_matches(name, names, 1, 0.6)
    if not found:  # a bare "rank" for "lora.rank"
        found = [n for n in names if n.split(".")[-1] == name.split(".")[-1]][:1]
    return f" (did you mean {found[0]}?)" if found else ""


def build(config: type, tree: Mapping[str, Any]) -> Any:
    """A config from nested dicts. Raises ConfigError listing every fault."""
    faults: list[str] = []
    try:
        built = _build(config, tree, "", [key for key, _, _ in options(config)], faults)
    except RecursionError as error:
        raise ConfigError("the options are nested too deeply") from error
    if faults:
        raise ConfigError(_listed(faults))
    return built


def read(recipe: str | Path | None, overrides: Iterable[str]) -> dict[str, Any]:
    """The tree of a TOML file (or none) with "key=value" overrides put in.

    Raises ConfigError for a file that cannot be read and overrides that are none.
    """
    tree: dict[str, Any] = {}
    if recipe is not None:
        try:
            tree = tomllib.loads(read_text(expanded(recipe), ConfigError))
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
            raise ConfigError(f"{recipe} is not valid TOML: {reason}") from error
    faults: list[str] = []
    for text in overrides:
        _override(tree, text, faults)
    if faults:
        raise ConfigError(_listed(faults))
    return tree


def _override(tree: dict[str, Any], text: str, faults: list[str]) -> None:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        faults.append(f"--set {text[:80]}: write it as key=value, e.g. lora.rank=32")
        return
    *tables, last = key.split(".")
    node: Any = tree
    for table in tables:
        node = node.setdefault(table, {})
        if not isinstance(node, dict):
            faults.append(f"--set {text[:80]}: {table[:40]} is not a table")
            return
    node[last] = _value(value.strip())


def _value(text: str) -> Any:
    """A TOML value; text that is none is a plain string (so paths need no quotes)."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text


def _build(
    config: type, tree: Mapping[str, Any], prefix: str, known: list[str], faults: list[str]
) -> Any:
    hints = typing.get_type_hints(config)
    fields = {item.name: item for item in dataclasses.fields(config)}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        if name not in fields:
            faults.append(f"unknown option {key[:80]}{nearest(key[:80], known)}")
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                values[name] = _build(
                    typing.cast(type, hints[name]), value, key + ".", known, faults
                )
            else:
                faults.append(f"{key} must be a table, not {_shown(value)}")
        else:
            values[name] = _checked(key, value, hints[name], fields[name].metadata, faults)
    return None if faults else config(**values)


def _checked(
    key: str, value: Any, kind: Any, metadata: Mapping[str, Any], faults: list[str]
) -> Any:
    fits, value = _convert(value, kind)
    if not fits:
        faults.append(f"{key} must be {_kind_name(kind)}, not {_shown(value)}")
    elif metadata["check"] is not None and not metadata["check"](value):
        faults.append(f"{key} must be {metadata['says']}, not {_shown(value)}")
    return value


def _convert(value: Any, kind: Any) -> tuple[bool, Any]:
    """(whether value is of this type, the value in it): lists become tuples, ints floats."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(value is a or value == a for a in arguments), value
    if origin in (types.UnionType, typing.Union):
        for one in arguments:
            fits, converted = _convert(value, one)
            if fits:
                return True, converted
        return False, value
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, Sequence) or isinstance(items, str):
            return False, value
        pairs = [_convert(item, arguments[0]) for item in items]
        return all(fits for fits, _ in pairs), tuple(item for _, item in pairs)
    if origin is dict:
        if not isinstance(value, Mapping):
            return False, value
        flat = dict(_flat(value))
        pairs = [_convert(item, arguments[1]) for item in flat.values()]
        return all(fits for fits, _ in pairs), dict(
            zip(flat, (item for _, item in pairs), strict=True)
        )
    if type(value) is int and abs(value) > LARGEST:
        return False, value
    if kind is float and type(value) is int:
        return True, float(value)
    if kind is float and isinstance(value, float):
        return value == value and abs(value) != float("inf"), value
    if kind is str and isinstance(value, str):
        return _is_text(value), value
    return type(value) is kind, value


def _is_text(value: str) -> bool:
    """Whether this can be written to a file and be the name of one."""
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def _shown(value: Any) -> str:
    """A wrong value in a message: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes, or too deep
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Undo the nesting that dots in a pattern's name cause in TOML keys."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _kind_name(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(repr(a) for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind_name(a) for a in arguments)
    if origin is tuple:
        return f"a list of {_kind_name(arguments[0])}"
    if origin is dict:
        return "a table of names"
    return {"int": "a whole number", "float": "a number", "str": "text"}.get(
        kind.__name__, kind.__name__
    )


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def by_key(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a config's tables by their dotted keys: {"lora.rank": 16}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found


def to_toml(tree: Mapping[str, Any]) -> str:
    """Nested dicts, one level of tables, as a TOML document."""
    lines = [f"{k} = {toml_value(v)}" for k, v in tree.items() if not isinstance(v, dict)]
    for table, values in tree.items():
        if isinstance(values, dict):
            lines += ["", f"[{table}]", *(f"{k} = {toml_value(v)}" for k, v in values.items())]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML, which agrees with JSON on strings, numbers, booleans and lists.

    Tables are written inline.
    """
    if isinstance(value, dict):
        inner = ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, str):  # TOML knows no surrogate pairs and wants DEL escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _listed(faults: list[str]) -> str:
    if len(faults) == 1:
        return faults[0]
    return f"{len(faults)} faults in the options:\n" + "\n".join(f"  {fault}" for fault in faults)
