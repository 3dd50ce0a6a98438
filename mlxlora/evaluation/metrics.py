"""Metrics of a generated answer beside the row's own: a table of names, a function each.

A metric is asked for as NAME or NAME:ARGUMENT. Higher is better for all of them. Libraries and
files that a metric needs are opened when it is asked for, before any model is loaded.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from mlxlora.errors import ConfigError, DataError
from mlxlora.readers import expanded, read_json
from mlxlora.schema import nearest

EXTRA = "it needs an extra: pip install 'mlxlora[metrics]'"


def _nothing_wrong(wanted: str) -> str | None:
    return None


@dataclass(frozen=True)
class Metric:
    """score(prompt, wanted, got); refuses(wanted) says why a row's own answer cannot be used."""

    name: str
    score: Callable[[str, str, str], float]
    refuses: Callable[[str], str | None] = _nothing_wrong
    share: bool = True  # each score is 0 or 1, so that their mean is a share of the rows


def metric(asked: str) -> Metric:
    """The metric of this name and argument. Raises ConfigError for one that cannot be used."""
    name, _, argument = asked.partition(":")
    if name not in METRICS:
        raise ConfigError(
            f"--metric {asked[:80]}: there is no metric {name[:40]!r}{nearest(name, METRICS)}; "
            f"there are {', '.join(METRICS)}"
        )
    return METRICS[name](asked, argument)


def metrics(asked: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics asked for, each once, in order."""
    return tuple(metric(one) for one in dict.fromkeys(asked))


def _exact(asked: str, argument: str) -> Metric:
    """The answer is the row's own, but for space around it."""
    _no_argument(asked, argument)
    return Metric(asked, lambda prompt, wanted, got: float(wanted.strip() == got.strip()))


def _contains(asked: str, argument: str) -> Metric:
    """The row's own answer, without space around it, is somewhere in the answer."""
    _no_argument(asked, argument)
    return Metric(
        asked,
        lambda prompt, wanted, got: float(wanted.strip() in got),
        lambda wanted: None if wanted.strip() else "its answer is empty, which all answers contain",
    )


def _regex(asked: str, argument: str) -> Metric:
    """The pattern is found in the answer; with a group, the last found is the row's own last.

    So "regex:#### (\\d+)" compares the final numbers of two calculations.
    """
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise ConfigError(f"--metric {asked[:80]}: not a regular expression: {error}") from error
    if not argument:
        raise ConfigError("--metric regex needs a pattern: --metric 'regex:PATTERN'")
    if not pattern.groups:
        return Metric(asked, lambda prompt, wanted, got: float(pattern.search(got) is not None))

    def last(text: str) -> tuple[str | Any, ...] | None:
        *_, found = [None, *(match.groups() for match in pattern.finditer(text))]
        return found

    def refuses(wanted: str) -> str | None:
        return None if last(wanted) else f"its own answer does not match {argument!r}"

    return Metric(asked, lambda prompt, wanted, got: float(last(got) == last(wanted)), refuses)


def _json(asked: str, argument: str) -> Metric:
    """The answer is JSON and nothing else; with a file, valid by the JSON Schema in it."""
    valid = _schema(asked, expanded(argument)) if argument else lambda value: True

    def score(prompt: str, wanted: str, got: str) -> float:
        try:
            return float(valid(orjson.loads(got)))
        except orjson.JSONDecodeError:
            return 0.0

    return Metric(asked, score)


def _schema(asked: str, path: Path) -> Callable[[Any], bool]:
    """Whether a value is valid by the schema in a file, of the draft that it names."""
    try:
        import jsonschema
        import referencing
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        raise ConfigError(f"--metric {asked[:80]}: {EXTRA}") from error
    schema = read_json(path, ConfigError)
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"{path} is not a JSON Schema: {error.message[:200]}") from error
    validator = kind(schema, registry=referencing.Registry())  # which fetches nothing

    def valid(value: Any) -> bool:
        try:
            return bool(validator.is_valid(value))
        except Unresolvable as error:
            raise ConfigError(f"{path}: a $ref leads outside of the file: {error}") from error
        except (re.error, RecursionError) as error:
            raise ConfigError(f"{path} cannot be applied: {error}") from error

    return valid


def _chrf(asked: str, argument: str) -> Metric:
    """chrF of each answer (Popović 2015) as sacrebleu computes it, between 0 and 1."""
    _no_argument(asked, argument)
    try:
        from sacrebleu.metrics import CHRF  # type: ignore[attr-defined]
    except ImportError as error:
        raise ConfigError(f"--metric {asked}: {EXTRA}") from error
    chrf = CHRF()

    def score(prompt: str, wanted: str, got: str) -> float:
        return float(chrf.sentence_score(got, [wanted]).score) / 100

    return Metric(asked, score, share=False)


def _python(asked: str, argument: str) -> Metric:
    """The user's own function(prompt, wanted, got) -> number or bool, in a file of theirs."""
    place, _, name = argument.rpartition(":")
    if not place or not name:
        raise ConfigError(f"--metric {asked[:80]}: write it as python:FILE.py:FUNCTION")
    function = _imported(asked, expanded(place), name)

    def score(prompt: str, wanted: str, got: str) -> float:
        try:
            value = function(prompt, wanted, got)
        except Exception as error:  # whatever the user's function raises
            raise DataError(f"{place}: {name}() raised {type(error).__name__}: {error}") from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"{place}: {name}() gave {value!r:.80}, which is no number")
        return number

    return Metric(asked, score, share=False)


def _imported(asked: str, path: Path, name: str) -> Callable[[str, str, str], Any]:
    if not path.is_file():
        raise ConfigError(f"--metric {asked[:80]}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("mlxlora_metric", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--metric {asked[:80]}: {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(
            f"{path} does not run: {type(error).__name__}: {str(error)[:400]}"
        ) from error
    function = vars(module).get(name)
    if not callable(function):
        named = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        known = ", ".join(named[:8]) or "none"
        raise ConfigError(f"{path} has no function {name}{nearest(name, named)}; it has: {known}")
    return function  # type: ignore[no-any-return]


def _no_argument(asked: str, argument: str) -> None:
    if argument:
        name = asked.partition(":")[0]
        raise ConfigError(f"--metric {asked[:80]}: {name} takes nothing after the colon")


# A new metric is one function and one line: (what was asked, what stands after the colon) -> it.
METRICS: dict[str, Callable[[str, str], Metric]] = {
    "exact": _exact,
    "contains": _contains,
    "regex": _regex,
    "json": _json,
    "chrf": _chrf,
    "python": _python,
}
