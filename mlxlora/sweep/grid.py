"""A grid of options -> the variants of a run: every combination, named, checked, none loaded.

What decides which rows are measured, and by which base, is the same for all variants, or their
validation losses could not be compared.
"""

import itertools
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError, MlxLoraError
from mlxlora.schema import nearest, options, toml_value

LONGEST_NAME = 80  # characters of a directory's name
MOST = 1000  # variants
# Why an option is the same for all variants, by what its key begins with.
FIXED = {
    "out": "it is the directory of the sweep",
    "model": "losses over different bases cannot be compared; sweep each on its own",
    "data.": "losses over different tokens cannot be compared; sweep each on its own",
    "train.seed": "all variants see the same rows in the same order",
    "eval.prompts": "it changes nothing that is trained",
    "save.": "it changes nothing that is trained",
}

Grid = Mapping[str, Sequence[Any]]  # option -> its values


@dataclass(frozen=True)
class Variant:
    """One combination."""

    name: str  # of its directory
    overrides: tuple[str, ...]  # "lora.rank=8"
    run: RunConfig


def read_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """The grid of "lora.rank=8,16" texts. Raises ConfigError listing every fault."""
    known = [key for key, _, _ in options(RunConfig)]
    grid: dict[str, list[Any]] = {}
    faults = []
    for text in texts:
        key, _, listed = text.partition("=")
        key = key.strip()
        values = _values(listed)
        if not values:
            faults.append(f"{text[:80]}: write it as key=value,value, e.g. lora.rank=8,16")
        elif key not in known:
            faults.append(f"unknown option {key[:80]}{nearest(key[:80], known)}")
        elif key in grid:
            faults.append(f"{key} is given twice; put all of its values into one --grid")
        elif any(a == b for a, b in itertools.combinations(values, 2)):
            faults.append(f"{text[:80]}: a value is there twice")
        elif why := next((why for start, why in FIXED.items() if _begins(key, start)), None):
            faults.append(f"{key} cannot vary in a sweep: {why}")
        else:
            grid[key] = values
    if not texts:
        faults.append("give what to try, e.g. --grid lora.rank=8,16,32; repeatable")
    if faults:
        raise ConfigError("--grid: " + "\n  ".join(["", *faults] if len(faults) > 1 else faults))
    return grid


def variants(
    recipe: Path | None, given: Sequence[str], grid: Grid, out: Path
) -> tuple[Variant, ...]:
    """All combinations, the last option varying fastest; each run's directory is below out.

    Raises ConfigError naming every combination that is faulty.
    """
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > MOST:
        raise ConfigError(f"--grid: {count:,} combinations; at most {MOST:,} are tried")
    combinations = list(itertools.product(*grid.values()))
    found, faults = [], list[tuple[str, str]]()
    for name, values in zip(_names(grid, combinations), combinations, strict=True):
        pairs = zip(grid, values, strict=True)
        overrides = tuple(f"{key}={toml_value(value)}" for key, value in pairs)
        try:
            run = RunConfig.load(recipe, [*given, *overrides])
        except ConfigError as error:
            faults.append((" ".join(overrides), str(error)))
            continue
        found.append(Variant(name, overrides, replace(run, out=str(out / name))))
    refuse(faults, count)
    return tuple(found)


def refuse(faults: Sequence[tuple[str, str]], of: int) -> None:
    """Raise ConfigError if there are faults: (variant, what is wrong), each kind told once.

    of: how many variants there are; what is wrong with all of them needs no names.
    """
    if not faults:
        return
    by_reason: dict[str, list[str]] = {}
    for variant, reason in faults:
        by_reason.setdefault(reason, []).append(variant)
    if len(by_reason) == 1 and len(faults) == of:
        raise ConfigError(faults[0][1])
    lines = []
    for reason, named in by_reason.items():
        lines += [*(f"  {name}" for name in named), *(f"    {x}" for x in reason.splitlines())]
    plural = "variant" if len(faults) == 1 else "variants"
    raise ConfigError(f"{len(faults)} {plural} cannot be run:\n" + "\n".join(lines))


def faults_of(
    found: Sequence[Variant], check: Any, kinds: type[MlxLoraError]
) -> list[tuple[str, str]]:
    """What check(run) raises of each variant."""
    faults = []
    for variant in found:
        try:
            check(variant.run)
        except kinds as error:
            faults.append((" ".join(variant.overrides), str(error)))
    return faults


def _begins(key: str, start: str) -> bool:
    return key.startswith(start) if start.endswith(".") else key == start


def _values(text: str) -> list[Any]:
    """TOML values between commas; text that is none is plain, so words need no quotes."""
    try:
        found = tomllib.loads(f"values = [{text}]")
        if len(found) == 1:
            return list(found["values"])
    except (ValueError, RecursionError):
        pass
    parts = [part.strip() for part in text.split(",")]
    return [_value(part) for part in parts] if all(parts) else []


def _value(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text


def _names(grid: Grid, combinations: Sequence[Sequence[Any]]) -> list[str]:
    """A directory's name for each: rank-8,learning_rate-0.0001, or numbers if that is no name."""
    short = Counter(key.rpartition(".")[2] for key in grid)
    labels = [k if short[k.rpartition(".")[2]] > 1 else k.rpartition(".")[2] for k in grid]
    names = [
        ",".join(f"{k}-{_word(v)}" for k, v in zip(labels, values, strict=True))
        for values in combinations
    ]
    unique = len({name.casefold() for name in names}) == len(names)  # as a Mac's disk sees them
    if unique and max(map(len, names)) <= LONGEST_NAME:
        return names
    width = len(str(len(names)))
    return [f"variant-{number:0{width}}" for number in range(1, len(names) + 1)]


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else toml_value(value)
    if isinstance(value, float):
        text = f"{value:g}"
    return re.sub(r"[^A-Za-z0-9.+_-]+", "_", text).strip("_")
