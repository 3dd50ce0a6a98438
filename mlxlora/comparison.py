"""Runs beside each other: which is best, on which rows, and what differs between them."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlxlora.runs import Run
from mlxlora.schema import by_key
from mlxlora.train.events import Step

NOT_COMPARED = {"out"}  # options that differ between any two runs
DIGITS = 12  # of hashes, shown
NO_ROWS = "no validation rows"
# What a row's loss depends on besides the weights: how it becomes tokens, which of them count.
OF_THE_LOSS = ("mask", "max_length", "columns")
OF_THE_TOKENS = ("tokenizer", "template")


@dataclass(frozen=True)
class Group:
    """Runs whose losses can be compared: validated on the same rows and tokens; best first."""

    title: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in all runs; a value a run, "" where there is none."""

    what: str
    values: tuple[str, ...]


def ranked(runs: Sequence[Run]) -> list[Group]:
    """Runs by what they were validated on, the largest group first, those without rows last."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_validated_on(run), []).append(run)
    ordered = sorted(groups.items(), key=lambda item: (item[0] == "", -len(item[1])))
    titles = [_rows_of(members[0]) if key else NO_ROWS for key, members in ordered]
    return [
        Group(
            title + (_how(members[0]) if titles.count(title) > 1 else ""),
            tuple(sorted(members, key=_standing)),
        )
        for title, (_, members) in zip(titles, ordered, strict=True)
    ]


def _validated_on(run: Run) -> str:
    """The same for runs whose validation losses are means over the same tokens; "": no rows."""
    valid, train = run.origin.data.get("valid"), run.origin.data.get("train")
    if not valid:
        return ""
    known = [valid.get("digest"), *(run.origin.base.get(key) for key in OF_THE_TOKENS)]
    known += [getattr(run.config.data, key) for key in OF_THE_LOSS]
    if train and train.get("path") == valid.get("path"):  # one file: a digest of all of it
        known += [run.config.data.valid_fraction, run.config.train.seed]
    return json.dumps(known, sort_keys=True)


def _how(run: Run) -> str:
    """What else the loss of those rows depends on, in words."""
    data, base = run.config.data, run.origin.base
    words = [f"mask {data.mask}", f"cut at {data.max_length:,} tokens"]
    words += [f"split by seed {run.config.train.seed} and {data.valid_fraction:g}"]
    words += [f"{key} {_short(base.get(key, '?'))[:DIGITS]}" for key in OF_THE_TOKENS]
    return f" ({', '.join(words)})"


def _standing(run: Run) -> tuple[float, str]:
    return (run.best.loss if run.best is not None else math.inf, str(run.path))


def _rows_of(run: Run) -> str:
    valid = run.origin.data["valid"]
    return f"validated on {valid['rows']:,} rows of {valid['path']}"


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Options, base, rows, versions and results that are not the same in all of these runs."""
    told = [dict(_told(run)) for run in runs]
    keys = dict.fromkeys(key for one in told for key in one)
    found = [Difference(key, tuple(one.get(key, "") for one in told)) for key in keys]
    return [one for one in found if len(set(one.values)) > 1]


def _told(run: Run) -> Iterator[tuple[str, str]]:
    for key, value in by_key(run.config.to_dict()).items():
        if key not in NOT_COMPARED:
            yield key, json.dumps(value, ensure_ascii=False)
    for key, value in run.origin.base.items():
        yield f"base {key}", _short(value)
    for split, told in run.origin.data.items():
        yield f"{split} rows", f"{told['rows']:,}, {_short(told['digest'])}"
    for name, version in run.origin.versions.items():
        yield f"version of {name}", version
    yield from results(run).items()


def results(run: Run) -> dict[str, str]:
    """What came of it, in words."""
    steps, start = run.every(Step), run.start
    found = {"state": run.state, "updates made": f"{run.updates:,}"}
    if start is not None:
        found["learning rate, peak"] = f"{start.learning_rate:g}"
        found["trained parameters"] = f"{start.trainable:,}"
    if run.before is not None:
        found["validation loss before"] = f"{run.before:.4f}"
    if run.best is not None:
        found["validation loss"] = f"{run.best.loss:.4f} (update {run.best.update:,})"
    if steps:
        found["training loss, last"] = f"{steps[-1].loss:.4f}"
        found["seconds an update"] = f"{sum(s.seconds for s in steps) / len(steps):.3g}"
        found["peak memory, GB"] = f"{max(s.peak_memory for s in steps) / 1e9:.3g}"
    return found


def _short(value: Any) -> str:
    text = str(value)
    is_hash = len(text) > 2 * DIGITS and all(c in "0123456789abcdef" for c in text)
    return text[:DIGITS] if is_hash else text


def as_json(run: Run) -> dict[str, Any]:
    """A run for programs."""
    best = run.best
    return {
        "name": run.name,
        "path": str(run.path),
        "state": run.state,
        "base": run.origin.base.get("name"),
        "method": run.config.lora.method,
        "rank": run.config.lora.rank,
        "learning_rate": run.start.learning_rate if run.start else None,
        "updates": run.updates,
        "valid_loss_before": run.before,
        "valid_loss": best.loss if best else None,
        "best_update": best.update if best else None,
        "valid_rows": (run.origin.data.get("valid") or {}).get("digest"),
        "seconds": seconds(run),
    }


def seconds(run: Run) -> float:
    """That training took, without what is computed again after a kill."""
    return sum(step.seconds for step in run.every(Step))
