"""What provenance.json tells of an adapter: read with suspicion, said to a person, compared.

Everything in it is optional. Of an adapter merged from several, "merge" holds how, and of each
parent what its own provenance.json told.
"""

import math
from collections.abc import Mapping
from typing import Any

# What is read of it; "*" stands for any name, [shape] for a list.
PARENT: dict[str, Any] = {
    "name": str,
    "weight": float,
    "weights_sha256": str,
    "base": {"*": str},
    "data": {"format": str, "files": {"*": {"path": str, "rows": int}}},
    "metrics": {"update": int, "updates": int, "valid_loss": float, "valid_loss_before": float},
}
TOLD: dict[str, Any] = {
    **{key: PARENT[key] for key in ("weights_sha256", "base", "data", "metrics")},
    "versions": {"*": str},
    "merge": {
        "method": str,
        "rank": int,
        "density": float,
        "seed": int,
        "distance": float,
        "parents": [PARENT],
    },
}
# What makes two bases different; names and revisions do not, for the weights are what counts.
COMPARED = {"fingerprint": "weights", "quantization": "quantization", "template": "chat template"}


def mistold(told: Any, shape: Any = TOLD, path: str = "") -> str:
    """Where told is not of this shape, or ''. null is as good as absent."""
    if told is None:
        return ""
    if isinstance(shape, list):
        if not isinstance(told, list):
            return f"{path[1:]} must be a list"
        inner = [(str(number), item, shape[0]) for number, item in enumerate(told, 1)]
    elif isinstance(shape, dict):
        if not isinstance(told, dict):
            return f"{path[1:]} must be an object"
        inner = [(name, value, shape.get(name, shape.get("*"))) for name, value in told.items()]
    else:
        return "" if is_a(told, shape) else f"{path[1:]} is {str(told)[:40]!r}"
    faults = (mistold(value, one, f"{path}.{name[:40]}") for name, value, one in inner if one)
    return next((fault for fault in faults if fault), "")


def is_a(value: Any, kind: type) -> bool:
    """Whether a JSON value is of this type; whole numbers are numbers, true is none."""
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    return type(value) is kind


def said(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know of it: label and value."""
    facts = _origin(told)
    merge = told.get("merge") or {}
    if merge:
        chosen = (f"{key} {merge[key]}" for key in ("density", "seed") if key in merge)
        facts.append(("merged by", ", ".join([str(merge.get("method")), *chosen])))
    for number, parent in enumerate(merge.get("parents") or (), 1):
        parent = parent or {}
        label, weight = f"parent {number}", parent.get("weight")
        times = "" if weight is None else f"{weight:g} times "
        facts.append((label, f"{times}{parent.get('name') or 'an adapter'}"))
        facts += [(f"{label}, {name}", text) for name, text in _origin(parent)]
    facts += [(name, str(text)) for name, text in (told.get("versions") or {}).items()]
    return facts if told else [("provenance", "none (not written by mlxlora)")]


def _origin(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Base, rows and losses."""
    base, data = told.get("base") or {}, told.get("data") or {}
    metrics = told.get("metrics") or {}
    facts = []
    if base:
        facts.append(("base", f"{base.get('name')} ({base.get('quantization')})"))
    for name, file in (data.get("files") or {}).items():
        told_of = file or {}
        rows = f"{told_of.get('rows') or 0:,} {data.get('format') or ''}"
        facts.append((f"{name} rows", f"{rows} in {told_of.get('path')}"))
    if metrics:
        facts.append(("update", f"{metrics.get('update')} of {metrics.get('updates')}"))
        before, after = metrics.get("valid_loss_before"), metrics.get("valid_loss")
        if before is not None and after is not None:
            facts.append(("validation loss", f"{before:.4f} before, {after:.4f} after"))
    return facts
