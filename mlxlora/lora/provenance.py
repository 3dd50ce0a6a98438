"""What provenance.json tells of an adapter: read with suspicion, and compared.

Everything in it is optional. Of an adapter merged from several, "merge" holds how, and of each
parent what its own provenance.json told.
"""

import math
from typing import Any

# What is read of it; "*" stands for any name, [shape] for a list.
PARENT: dict[str, Any] = {
    "name": str,
    "weight": float,
    "weights_sha256": str,
    "base": {"*": str},
    "data": {"format": str, "files": {"*": {"path": str, "rows": int}}},
    "metrics": {
        "update": int,
        "updates": int,
        "valid_loss": float,
        "valid_loss_before": float,
        "learning_rate": float,
    },
    "run": {"lora": {"method": str}},
}
TOLD: dict[str, Any] = {
    **{key: PARENT[key] for key in ("weights_sha256", "base", "data", "metrics", "run")},
    "versions": {"*": str},
    "imported": {"*": str},  # an adapter of another program
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
COMPARED = {
    "fingerprint": "weights",
    "quantization": "quantization",
    "tokenizer": "tokenizer",
    "template": "chat template",
}


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
