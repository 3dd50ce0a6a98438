"""Figures that lie beside a run: what eval saved, and how true a fused model is.

They are files of others, read with suspicion: what is not as expected is an error that names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora.errors import CheckpointError
from mlxlora.lora.provenance import is_a, mistold
from mlxlora.readers import read_json

_EVALUATION: dict[str, Any] = {
    "model": str,
    "data": str,
    "results": [
        {
            "name": str,
            "loss": float,
            "perplexity": float,
            "tokens": int,
            "rows": int,
            "metrics": {"*": {"value": float}},
        }
    ],
    "comparisons": [
        {"metric": str, "a": str, "b": str, "difference": float, "verdict": str},
    ],
}
_FIDELITY: dict[str, Any] = {
    "rows": str,
    "tokens": int,
    "adapter": str,
    **{f"loss_{name}": float for name in ("base", "adapter", "written")},
    **{name: float for name in ("kl_base", "kl", "agreement_base", "agreement", "kept")},
}


@dataclass(frozen=True)
class Row:
    """A model of an evaluation: its figures as text, in the order of the columns."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    path: Path
    data: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    verdicts: tuple[str, ...]


def read_evaluation(path: Path) -> Evaluation:
    """What `mlxlora eval --save` wrote. Raises CheckpointError for anything else."""
    told = _read(path, _EVALUATION, "results", "a file of mlxlora eval --save")
    scored = [one.get("metrics") or {} for one in told["results"]]
    names = list(dict.fromkeys(name for one in scored for name in one))
    rows = [
        Row(
            str(one.get("name")),
            (
                _number(one.get("loss"), one.get("loss_interval")),
                _number(one.get("perplexity")),
                f"{one.get('tokens') or 0:,}",
                *(_metric((one.get("metrics") or {}).get(name)) for name in names),
            ),
        )
        for one in told["results"]
    ]
    verdicts = [_verdict(one) for one in told.get("comparisons") or ()]
    columns = ("loss", "perplexity", "tokens", *names)
    return Evaluation(path, str(told.get("data")), columns, tuple(rows), tuple(verdicts))


def _metric(told: Mapping[str, Any] | None) -> str:
    return "" if told is None else _number(told.get("value"), told.get("interval"))


def _number(value: Any, interval: Any = None) -> str:
    """A figure, and between which it lies with 95 %."""
    if not is_a(value, float):
        return ""
    shown = f"{value:.4g}"
    if isinstance(interval, list) and len(interval) == 2 and all(is_a(i, float) for i in interval):
        shown += f" [{interval[0]:.4g}, {interval[1]:.4g}]"
    return shown


def _verdict(told: Mapping[str, Any]) -> str:
    difference = _number(told.get("difference"), told.get("interval"))
    metric, a, b, verdict = (told.get(key) for key in ("metric", "a", "b", "verdict"))
    return f"{metric}: {a} beside {b}: {verdict} ({difference})"


@dataclass(frozen=True)
class FusedFigures:
    path: Path
    facts: tuple[tuple[str, str], ...]


def read_fused(directory: Path, run_weights: str) -> FusedFigures:
    """fidelity.json of a fused model, if it is made of the adapter with these weights.

    run_weights: the adapter's hash, "" if it is not known. Raises CheckpointError.
    """
    told = _read(directory / "fidelity.json", _FIDELITY, "kl", "the figures of a fused model")
    if run_weights and told.get("adapter") and told["adapter"] != run_weights:
        raise CheckpointError(f"{directory} was fused with another adapter than this run's")
    losses = " → ".join(_number(told.get(f"loss_{n}")) for n in ("base", "adapter", "written"))
    facts = [
        ("measured on", f"{told.get('rows')}, {told.get('tokens') or 0:,} tokens"),
        ("loss: base → base + adapter → fused", losses),
        ("KL from base + adapter, nats per token", _number(told["kl"])),
        ("of the bare base", _number(told.get("kl_base"))),
        ("same first choice of token", f"{told.get('agreement') or 0:.1%}"),
    ]
    if is_a(told.get("kept"), float):
        facts.append(("of what training gained, kept", f"{told['kept']:.1%}"))
    return FusedFigures(directory, tuple(facts))


def _read(path: Path, shape: dict[str, Any], needed: str, what: str) -> dict[str, Any]:
    told = read_json(path, CheckpointError)
    fault = mistold(told, shape) or ("" if told.get(needed) is not None else f"no {needed}")
    if fault:
        raise CheckpointError(f"{path} is not {what}: {fault}")
    return told
