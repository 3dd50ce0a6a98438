"""Inputs nobody wants: damaged bytes, JSON trees with something wrong anywhere in them.

MLXLORA_EXAMPLES says how many inputs a property is tried with (few and always the same ones by
default), MLXLORA_COUNTS names a file that is told how many there were.
"""

import atexit
import contextlib
import copy
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mlxlora.errors import MlxLoraError

EXAMPLES = int(os.environ.get("MLXLORA_EXAMPLES", "0"))
SECONDS = 60  # that an input may take before it counts as a hang
LONGEST = 6000  # characters of a message that is still clear

DEEP = 10_000
NAMES = [
    "../../outside",
    "/etc/hosts",
    "a/b",
    "..",
    ".",
    "",
    "\0",
    "x" * 5000,
    "\ud800",
    "~nobody/x",
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e308, 1e-308),
    *(float("inf"), float("nan"), "1", "true", [], {}, [[]], [None], {"": None}, [1, "a", {}]),
    *NAMES,
]

few = settings(max_examples=25, derandomize=True)
many = settings(max_examples=EXAMPLES or 1)
settings.register_profile(
    "hostile",
    parent=many if EXAMPLES else few,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("hostile")

tried: Counter[str] = Counter()
refused: Counter[str] = Counter()

scalars = (
    st.sampled_from(VALUES).map(copy.deepcopy) | st.integers() | st.floats() | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@contextlib.contextmanager
def value_or_error(what: str, kind: type[MlxLoraError] = MlxLoraError) -> Iterator[None]:
    """The block gives a value or one clear error of this kind; nothing else, and soon."""
    tried[what] += 1

    def late(*_: object) -> None:
        raise TimeoutError(f"{what}: no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    except kind as error:
        refused[what] += 1
        text = str(error)
        assert text.strip() and len(text) <= LONGEST, text[:500]
        text.encode()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def nothing_written(directory: Path) -> Iterator[None]:
    """Nothing comes into being below directory, and nothing goes."""
    before = {(str(p), p.lstat().st_mtime_ns) for p in directory.rglob("*") if not p.is_dir()}
    yield
    after = {(str(p), p.lstat().st_mtime_ns) for p in directory.rglob("*") if not p.is_dir()}
    assert after == before


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes that were cut, flipped, doubled or put in where they do not belong."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        match draw(st.sampled_from(["cut", "flip", "drop", "put", "double", "end"])):
            case "cut":
                del data[start:]
            case "flip":
                for place in range(start, min(end, start + 4)):
                    data[place] ^= draw(st.integers(1, 255))
            case "drop":
                del data[start:end]
            case "put":
                data[start:start] = draw(st.binary(max_size=12))
            case "double":
                data[start:start] = data[start:end]
            case "end":
                data += draw(st.binary(max_size=12))
    return bytes(data)


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one to three of its places removed, replaced or added to."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            return draw(values)
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "replace", "remove", "rename", "swap"])):
            case "replace":
                holder[key] = draw(values)
            case "remove":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(st.sampled_from(NAMES) | st.text(max_size=8))] = holder.pop(key)
            case "swap":
                other, there = draw(st.sampled_from(places))
                with contextlib.suppress(KeyError, IndexError):
                    holder[key] = copy.deepcopy(other[there])
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(the object or list, the key or index) of everything in a JSON tree."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from _places(tree[key])


def json_text(tree: Any) -> str:
    """As JSON; halves of surrogate pairs are escaped, NaN and Infinity are written as such."""
    return json.dumps(tree)


# Texts that no JSON or TOML tree gives.
JSON_TEXTS = [
    *("", " ", "\0", "null", "[]", "5", '"x"', "{", '{"a":', "\ufeff{}", "{}{}", "NaN"),
    *("[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP),
    *('{"a": ' + "1" * 5000 + "}", '{"a": 1e999}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}'),
]


def tell() -> None:
    lines = [
        f"{what}: {count:,} inputs, {refused[what]:,} refused\n"
        for what, count in sorted(tried.items())
    ]
    with open(os.environ["MLXLORA_COUNTS"], "a", encoding="utf-8") as file:
        file.writelines([*lines, f"in this process: {tried.total():,} inputs\n"])


if "MLXLORA_COUNTS" in os.environ:
    atexit.register(tell)
