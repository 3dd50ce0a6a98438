"""Several adapters into one, which holds a weighted mixture of what they do to the weights.

The methods are in mixing.py; what cannot be merged, and why, in mergeable.py. No base is needed:
a layer's kind shows in its tensors. What was folded into B because modules differ in scale
(adapter.py) counts as part of B.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora.config import MAX_RANK
from mlxlora.errors import AdapterError, ConfigError
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.fresh import random_key
from mlxlora.lora.mergeable import KINDS, check, check_ranks, paths
from mlxlora.lora.mixing import METHODS, Method, Share, mix
from mlxlora.lora.provenance import PARENT

ADAPTER = "adapter"  # the directory of every run's own


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "svd",
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    *,
    names: Sequence[str] = (),
    force: bool = False,
) -> Adapter:
    """One adapter that mixes these, with a scale of 1.

    weights: one an adapter, of any sign (None: equal ones that sum to 1). rank: of the result
    (None: the largest of the adapters', for "cat" their sum); a lower one keeps the best of what
    the method made. density: share of the numbers that "ties" and "dare" keep
    (None: 0.2 and 0.9). seed: of what "dare" drops (None: 0). names: of the adapters, for messages
    and, without what leads there, provenance. A module that an adapter lacks counts as zero there.

    provenance["merge"] tells of the parents, and of "distance": the Frobenius norm of what the
    result adds to the weights less the weighted sum of what the adapters add, relative to that
    sum. Raises ConfigError for what cannot be chosen, AdapterError for adapters that cannot be
    merged or, unless force is True, that were trained on different bases.
    """
    how = _method(method, {"density": density, "seed": seed})
    weights = _weights(weights, len(adapters))
    names = names or [f"adapter {number}" for number in range(1, len(adapters) + 1)]
    named = list(zip(names, adapters, strict=True))
    check(named, force=force)
    if not how.any_ranks:
        check_ranks(named, [name for name, other in METHODS.items() if other.any_ranks])
    rank = _rank(how, rank, [adapter.rank for adapter in adapters])
    density = how.density if density is None else density
    seed = seed or 0
    tensors: dict[str, mx.array] = {}
    distances, norms = [], []
    for number, path in enumerate(paths(named)):
        shares = _shares(adapters, weights, path, (seed, number))
        mixed = mix(how, shares, rank, density)
        if not math.isfinite(mixed.distance):
            raise AdapterError(f"{path}: merged, its numbers are too large; use smaller weights")
        distances.append(mixed.distance)
        norms.append(mixed.norm)
        a, b = KINDS[mixed.left.ndim].factors(mixed.left, mixed.right)
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    chosen = {"rank": rank, "density": density, "seed": seed}
    record = {
        "method": method,
        **{name: value for name, value in chosen.items() if name in ("rank", *how.takes)},
        "distance": math.hypot(*distances) / (math.hypot(*norms) or 1.0),
        "parents": list(map(_parent, names, weights, adapters)),
    }
    blocks = max(adapter.blocks for adapter in adapters)
    provenance = {**_common(adapters), "merge": record}
    return Adapter("lora", tensors, rank, 1.0, blocks=blocks, provenance=provenance)


def _method(name: str, chosen: dict[str, Any]) -> Method:
    """Raises ConfigError for an unknown method, for what it cannot be told, or is told wrongly."""
    if name not in METHODS:
        raise ConfigError(f"no method {name!r} to merge by; there are {', '.join(METHODS)}")
    for option, value in chosen.items():
        if value is None:
            continue
        if option not in METHODS[name].takes:
            able = [other for other, method in METHODS.items() if option in method.takes]
            raise ConfigError(f"{option} means nothing to {name}, but to {' and '.join(able)}")
        if option == "density" and not 0 < value <= 1:
            raise ConfigError(f"density must be above 0 and at most 1, not {value}")
        if option == "seed" and value < 0:
            raise ConfigError(f"seed must be at least 0, not {value}")
    return METHODS[name]


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if not count:
        raise ConfigError("there are no adapters to merge")
    if weights is None:
        return [1 / count] * count
    shown = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise ConfigError(
            f"{count} adapters and {len(weights)} weights ({shown}): give one for each adapter"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"every weight must be a finite number, but they are {shown}")
    return [float(weight) for weight in weights]


def _rank(how: Method, wished: int | None, ranks: Sequence[int]) -> int:
    """Of the result."""
    if wished is not None and wished < 1:
        raise ConfigError(f"rank must be at least 1, not {wished}")
    if wished and wished > sum(ranks):
        raise ConfigError(
            f"rank {wished} is more than the adapters have together: {sum(ranks)}, which holds "
            "the whole sum (cat)"
        )
    rank = wished or how.rank(ranks)
    if rank > MAX_RANK:
        raise ConfigError(
            f"the result would have rank {rank:,}, above {MAX_RANK:,}; --rank lowers it"
        )
    return rank


def _shares(
    adapters: Sequence[Adapter], weights: Sequence[float], path: str, seeds: tuple[int, int]
) -> list[Share]:
    """Of the adapters that have this module."""
    shares = []
    for place, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        own = {leaf: array.astype(mx.float32) for leaf, array in adapter.tensors(path).items()}
        if own:
            left, right = KINDS[own["lora_a"].ndim].sides(own["lora_a"], own["lora_b"])
            shares.append(Share(left, right, weight * adapter.scale, random_key(*seeds, place)))
    return shares


def _parent(name: str, weight: float, adapter: Adapter) -> dict[str, Any]:
    """What is told of one, and of its name no path: runs/sql/adapter is "sql"."""
    told = {key: adapter.provenance[key] for key in PARENT if key in adapter.provenance}
    parts = [part for part in Path(os.path.abspath(name)).parts if part != ADAPTER]
    return {**told, "name": parts[-1], "weight": weight}


def _common(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What holds for the result as well: the base, and the format of rows if all have one."""
    bases = [base for adapter in adapters if (base := adapter.provenance.get("base"))]
    formats = {adapter.format for adapter in adapters} - {""}
    data = {"data": {"format": formats.pop()}} if len(formats) == 1 else {}
    return {**({"base": bases[0]} if bases else {}), **data}
