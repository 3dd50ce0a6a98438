"""write_report(directory): the page of a run, or of the runs below, as a file."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora.errors import CheckpointError, ConfigError
from mlxlora.files import atomic_file
from mlxlora.lora.provenance import mistold
from mlxlora.readers import read_json
from mlxlora.report.page import check_target, comparison_page, page
from mlxlora.runs import Run, find_runs, load_run

PAGE, SWEEP = "report.html", "sweep.json"
_SWEEP: dict[str, Any] = {
    "recipe": str,
    "grid": {"*": None},
    "variants": [{"name": str, "run": str, "state": str, "updates": int, "loss": float}],
}


@dataclass(frozen=True)
class Written:
    path: Path
    what: str
    runs: list[str]


def write_report(
    directory: Path,
    out: Path | None = None,
    evaluations: Sequence[Path] = (),
    fused: Path | None = None,
) -> Written:
    """Write report.html into directory, or to out; one that is there is replaced.

    Raises CheckpointError if there is no run, ConfigError for options of one run alone.
    """
    path = out or directory / PAGE
    check_target(path)
    found = find_runs(directory)
    if not found:
        raise CheckpointError(f"{directory} is no run, and there is none below it")
    if found == [directory]:
        html, what = page(load_run(directory), evaluations, fused), "one run"
    elif evaluations or fused is not None:
        raise ConfigError("--eval and --fused are of one run; name that run's directory")
    else:
        runs, left_out = _read(found)
        html = comparison_page(runs, directory.resolve().name, *_sweep(directory))
        what = "; ".join([f"{len(runs)} runs" if len(runs) > 1 else "one run", *left_out])
    with atomic_file(path) as file:
        file.write(html.encode("utf-8"))
    return Written(path, what, [str(each) for each in found])


def _read(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and what is to be said of those that cannot be read. One at least can be."""
    runs, faults = [], []
    for path in paths:
        try:
            runs.append(load_run(path))
        except (CheckpointError, ConfigError) as error:
            faults.append(f"left out {path}: {error}")
    if not runs:
        raise CheckpointError("\n".join(faults))
    return runs, faults


def _sweep(directory: Path) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """What a sweep says of itself, and of each variant by its run's name; nothing if it is none."""
    path = directory / SWEEP
    if not path.is_file():
        return [], {}
    told = read_json(path, CheckpointError)
    if fault := mistold(told, _SWEEP):
        raise CheckpointError(f"{path} is damaged: {fault}")
    variants = told.get("variants") or []
    states = {str(one.get("run")): str(one.get("state")) for one in variants}
    facts = [("recipe", str(told.get("recipe")))]
    facts += [
        (f"{key} tried", ", ".join(str(value) for value in values))
        for key, values in (told.get("grid") or {}).items()
    ]
    counts = ", ".join(f"{n} {state}" for state, n in Counter(states.values()).items())
    return [*facts, ("variants", f"{len(variants)}: {counts}")], states
