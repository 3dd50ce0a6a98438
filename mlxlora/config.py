"""Every option once: its default, unit, help and limits; TOML and overrides in, strictly.

A recipe is data: a TOML file whose tables are the dataclasses below. Overrides are
"key=value" strings with dotted keys and TOML values. Unknown keys, wrong types and
impossible values are collected and raised together, before anything is loaded.
This file opens no models and no data.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlxlora.errors import ConfigError

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


def _positive(value: Any) -> bool:
    return bool(value > 0)


def _not_negative(value: Any) -> bool:
    return bool(value >= 0)


def _fraction(value: Any) -> bool:
    return bool(0 <= value < 1)


def _all_positive(table: Any) -> bool:
    return all(value > 0 for value in table.values())


# Our names of a row's keys (data/formats.py reads them).
COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output"),
    *("text", "system", "tools"),
)


@dataclass(frozen=True)
class DataConfig:
    path: str = option("", "JSONL file (split automatically) or directory with train.jsonl")
    max_length: int = option(
        2048, "longer rows are cut", "tokens", lambda n: n >= 2, "at least 2", flag=True
    )
    mask: Literal["assistant", "completion", "all"] = option(
        "assistant",
        "tokens trained: all assistant turns, the last one only, or every token",
        flag=True,
    )
    columns: dict[str, str] = option(
        {},
        "other names of the row's keys, e.g. {prompt = 'question', completion = 'answer'}",
        check=lambda table: all(name in COLUMNS for name in table),
        says=f"a table whose names are among {', '.join(COLUMNS)}",
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "stop at a row that cannot be used, or skip and count it", flag=True
    )
    valid_fraction: float = option(
        0.1,
        "share of a single file kept for validation (at most 1,000 rows)",
        check=lambda x: 0 <= x <= 0.5,
        says="between 0 and 0.5",
    )


@dataclass(frozen=True)
class LoraConfig:
    method: Literal["lora", "full"] = option(
        "lora", "low-rank adapter, or every weight (full)", flag=True
    )
    rank: int = option(16, "rank r of the update", "", _positive, "at least 1", flag=True)
    alpha: float = option(
        32.0, "the update is scaled by alpha / rank", "", _positive, "above 0", flag=True
    )
    dropout: float = option(
        0.0, "dropout on the adapter's input", "", _fraction, "at least 0 and below 1", flag=True
    )
    targets: tuple[str, ...] = option(
        ("all-linear",),
        "modules to adapt: 'all-linear', names (q_proj) or patterns (*.self_attn.*)",
        check=lambda names: len(names) > 0,
        says="at least one name",
    )
    blocks: int | tuple[int, ...] = option(
        0, "0: all blocks; n: the last n; or a list of block numbers"
    )
    rank_pattern: dict[str, int] = option(
        {},
        "rank of modules that match a pattern",
        check=_all_positive,
        says="a table of ranks of at least 1",
    )
    alpha_pattern: dict[str, float] = option(
        {},
        "alpha of modules that match a pattern",
        check=_all_positive,
        says="a table of numbers above 0",
    )


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = option(2.0, "passes over the data", "", _positive, "above 0", flag=True)
    updates: int = option(
        0,
        "exact number of optimizer updates (0: from epochs)",
        "optimizer updates",
        _not_negative,
        "0 or more",
        flag=True,
    )
    batch_size: int = option(
        8, "examples per optimizer update", "examples", _positive, "at least 1", flag=True
    )
    learning_rate: float = option(
        0.0,
        "peak learning rate (0: 2e-4, or 1e-4 from 14B parameters; full: 2e-5)",
        "",
        _not_negative,
        "0 or more",
        flag=True,
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "how the rate falls after warmup: cosine to 10 %, linear to 0, or not at all"
    )
    warmup: float = option(
        0.03,
        "below 1: share of all updates; from 1: number of updates",
        "optimizer updates",
        _not_negative,
        "0 or more",
    )
    optimizer: Literal["adamw", "adam", "lion", "adafactor", "sgd", "muon"] = option(
        "adamw", "optimizer", flag=True
    )
    weight_decay: float = option(0.0, "decoupled weight decay", "", _not_negative, "0 or more")
    clip: float = option(
        1.0, "largest global gradient norm (0: no clipping)", "", _not_negative, "0 or more"
    )
    seed: int = option(
        0,
        "seed of order, initialisation and dropout",
        "",
        _not_negative,
        "0 or more",
        flag=True,
    )
    tokens_per_microbatch: int | Literal["auto"] = option(
        "auto",
        "an update is cut into pieces of at most this many tokens; the result is the same",
        "tokens",
        lambda n: n == "auto" or n >= 1,
        "'auto' or at least 1",
    )


@dataclass(frozen=True)
class EvalConfig:
    every: int = option(
        0,
        "validate every so many updates (0: about ten times a run)",
        "optimizer updates",
        _not_negative,
        "0 or more",
    )
    patience: int = option(
        0,
        "stop after so many validations without a better one (0: never)",
        "validations",
        _not_negative,
        "0 or more",
    )
    prompts: tuple[str, ...] = option((), "prompts answered at each validation")
    max_tokens: int = option(64, "length of those answers", "tokens", _positive, "at least 1")


@dataclass(frozen=True)
class RunConfig:
    """A whole run. RunConfig.load reads a recipe and overrides; RunConfig.from_dict a dict."""

    model: str = option("", "local directory or Hub id of the base model")
    out: str = option("", "directory of the run; must not exist yet")
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @classmethod
    def load(cls, recipe: str | Path | None = None, overrides: Iterable[str] = ()) -> "RunConfig":
        """Read a TOML recipe (or none) and apply "key=value" overrides.

        Raises ConfigError with every fault: unreadable TOML, unknown keys, wrong types.
        """
        tree: dict[str, Any] = {}
        if recipe is not None:
            try:
                tree = tomllib.loads(Path(recipe).read_text(encoding="utf-8"))
            except OSError as error:
                raise ConfigError(f"cannot read recipe {recipe}: {error.strerror}") from error
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(f"{recipe} is not valid TOML: {error}") from error
        faults: list[str] = []
        for text in overrides:
            _override(tree, text, faults)
        if faults:
            raise ConfigError(_listed(faults))
        return cls.from_dict(tree)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "RunConfig":
        """Build from nested dicts. Raises ConfigError listing every fault."""
        faults: list[str] = []
        config = _build(cls, tree, "", faults)
        if faults:
            raise ConfigError(_listed(faults))
        return typing.cast(RunConfig, config)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, tuples as lists: the inverse of from_dict."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))

    def to_toml(self) -> str:
        """The resolved config as TOML that RunConfig.load reads back to an equal value."""
        tree = self.to_dict()
        lines = [f"{k} = {toml_value(v)}" for k, v in tree.items() if not isinstance(v, dict)]
        for table, values in tree.items():
            if isinstance(values, dict):
                lines += ["", f"[{table}]", *(f"{k} = {toml_value(v)}" for k, v in values.items())]
        return "\n".join(lines) + "\n"


def options(config: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, type, dataclass field) of every option."""
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


def _override(tree: dict[str, Any], text: str, faults: list[str]) -> None:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        faults.append(f"--set {text}: write it as key=value, e.g. lora.rank=32")
        return
    *tables, last = key.split(".")
    node: Any = tree
    for table in tables:
        node = node.setdefault(table, {})
        if not isinstance(node, dict):
            faults.append(f"--set {text}: {table} is not a table")
            return
    node[last] = _value(value.strip())


def _value(text: str) -> Any:
    """A TOML value; text that is none is a plain string (so paths need no quotes)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(config: type, tree: Mapping[str, Any], prefix: str, faults: list[str]) -> Any:
    hints = typing.get_type_hints(config)
    fields = {item.name: item for item in dataclasses.fields(config)}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        if name not in fields:
            faults.append(f"unknown option {key}{nearest(key, [k for k, _, _ in options()])}")
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                values[name] = _build(typing.cast(type, hints[name]), value, key + ".", faults)
            else:
                faults.append(f"{key} must be a table, not {value!r}")
        else:
            values[name] = _checked(key, value, hints[name], fields[name].metadata, faults)
    return None if faults else config(**values)


def _checked(
    key: str, value: Any, kind: Any, metadata: Mapping[str, Any], faults: list[str]
) -> Any:
    fits, value = _convert(value, kind)
    if not fits:
        faults.append(f"{key} must be {_kind_name(kind)}, not {value!r}")
    elif metadata["check"] is not None and not metadata["check"](value):
        faults.append(f"{key} must be {metadata['says']}, not {value!r}")
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
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if kind is float and isinstance(value, float):
        return value == value and abs(value) != float("inf"), value
    return type(value) is kind, value


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


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
