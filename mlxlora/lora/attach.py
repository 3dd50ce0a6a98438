"""Putting low-rank layers into a model and taking them out again, exactly.

targets choose modules ("all-linear", names, glob patterns); new_layers() makes fresh ones
for training; attach() puts an adapter's weights in; detach() restores the base; collect()
reads the adapter back out. The base's own arrays are never written.
"""

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora.base import Base
from mlxlora.config import LoraConfig
from mlxlora.errors import AdapterError, ConfigError
from mlxlora.lora.adapter import Adapter, differences
from mlxlora.lora.layers import EXPERTS, LINEAR, LowRank, layer_for

ROUTERS = {"gate", "router", "shared_expert_gate"}  # names of modules that choose experts
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class _Replaced:
    """The base's own weights while a "full" adapter stands in their place."""

    weights: dict[str, mx.array]


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """(path, layer) of every attached layer, in order of path."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, LowRank)]
    return iter(sorted(found, key=lambda pair: _natural(pair[0])))


def targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that config.targets and config.blocks choose, in order.

    "all-linear" is every linear layer of the blocks, experts included, but no router,
    embedding or head. Raises ConfigError for a target that matches nothing.
    """
    prefixes = _block_prefixes(model, config.blocks)
    paths = {path: m for path, m in model.named_modules() if layer_for(m) is not None}
    inside = {p for p in paths if p.startswith(tuple(prefixes))}
    chosen: set[str] = set()
    for target in config.targets:
        if target == ALL_LINEAR:
            matched = {
                p for p in inside if isinstance(paths[p], LINEAR + EXPERTS) and not _router(p)
            }
        else:
            matched = {p for p in paths if _matches(p, target)}
            if config.blocks != 0:
                matched &= inside
        if not matched:
            names = sorted({p.rpartition(".")[2] for p in paths})
            raise ConfigError(
                f"lora.targets: {target!r} matches no module of this model; "
                f"it has {', '.join(names)}"
            )
        chosen |= matched
    return sorted(chosen, key=_natural)


def new_layers(model: nn.Module, config: LoraConfig, seed: int) -> list[str]:
    """Put fresh low-rank layers over the targets and train only these; return their paths.

    Each layer's A depends on the seed and its place only. What was attached is taken out.
    """
    detach(model)
    paths = targets(model, config)
    modules = dict(model.named_modules())
    fresh: list[tuple[str, nn.Module]] = []
    for number, path in enumerate(paths):
        rank = int(_by_pattern(config.rank_pattern, path, config.rank))
        alpha = float(_by_pattern(config.alpha_pattern, path, config.alpha))
        kind = layer_for(modules[path])
        assert kind is not None
        layer = kind(modules[path], rank, alpha / rank, config.dropout)
        layer.init(random_key(seed, number))
        fresh.append((path, layer))
    _unmatched_patterns(config, paths)
    _put(model, fresh)
    return paths


def random_key(*numbers: int) -> mx.array:
    """An MLX random key that is a function of these numbers."""
    return mx.array(np.random.SeedSequence(numbers).generate_state(2))


def prepare_full(model: nn.Module) -> None:
    """Make every weight trainable, in float32, and remember the base's for detach()."""
    own = dict(tree_flatten(model.parameters()))
    model._mlxlora_replaced = _Replaced(own)
    model.set_dtype(mx.float32)
    model.unfreeze()


def attach(model: nn.Module | Base, adapter: Adapter, *, force: bool = False) -> None:
    """Put a trained adapter into the model, replacing one that is attached.

    Given a Base, it must be the one the adapter was trained on unless force is True. Raises
    AdapterError naming every tensor that does not fit, or what differs between the bases.
    """
    if isinstance(model, Base):
        if not force:
            check_base(model, adapter)
        model = model.model
    detach(model)
    if adapter.method == "full":
        _attach_full(model, adapter.weights)
        return
    modules = dict(model.named_modules())
    faults: list[str] = []
    layers: list[tuple[str, nn.Module]] = []
    for path in adapter.modules:
        layer = _filled(modules.get(path), path, adapter, faults)
        if layer is not None:
            layers.append((path, layer))
    if faults:
        raise AdapterError(_misfit(adapter, faults))
    _put(model, layers)
    model.eval()


def detach(model: nn.Module) -> None:
    """Take every attached layer out; the model is the base again, with the base's arrays."""
    model.update_modules(
        tree_unflatten([(path, layer.base) for path, layer in low_rank_layers(model)])
    )
    replaced = getattr(model, "_mlxlora_replaced", None)
    if replaced is not None:
        model.load_weights(list(replaced.weights.items()), strict=False)
        del model._mlxlora_replaced
    model.freeze()


def collect(model: nn.Module, config: LoraConfig, provenance: Mapping[str, Any]) -> Adapter:
    """The attached layers (or, for "full", all trained weights) as an Adapter."""
    blocks = len(getattr(model, "layers", ()))
    if config.method == "full":
        weights = dict(tree_flatten(model.trainable_parameters()))
        return Adapter("full", weights, blocks=blocks, provenance=provenance)
    layers = list(low_rank_layers(model))
    rank = max(layer.rank for _, layer in layers)
    scale = next((s for s in [config.alpha / config.rank] if s), 1.0)
    weights = {}
    for path, layer in layers:
        a, b = layer.lora_a, layer.lora_b
        if layer.scale != scale:
            b = b * (layer.scale / scale)
        shape_a, shape_b = layer.shapes(layer.base, rank)
        weights[f"{path}.lora_a"], weights[f"{path}.lora_b"] = _pad(a, shape_a), _pad(b, shape_b)
    return Adapter("lora", weights, rank, scale, config.dropout, blocks, provenance)


def check_base(base: Base, adapter: Adapter) -> None:
    """Raise AdapterError, saying what differs, if the adapter is of another base."""
    found = differences(adapter.provenance, base.identity.to_dict())
    if found:
        name = adapter.provenance["base"].get("name", "another base")
        raise AdapterError(
            "the adapter was trained on another base:\n"
            + "\n".join(f"  {line}" for line in found)
            + f"\nIt was trained on {name}; load that base, or pass --force."
        )


def _put(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
    model.freeze()
    model.update_modules(tree_unflatten(layers))
    for _, layer in layers:
        layer.freeze()
        layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)


def _filled(
    module: nn.Module | None, path: str, adapter: Adapter, faults: list[str]
) -> nn.Module | None:
    """A low-rank layer over module with the adapter's weights, or None and why in faults."""
    kind = layer_for(module)
    if module is None or kind is None:
        faults.append(f"{path}: the base has no such layer")
        return None
    weights = {k: adapter.weights.get(f"{path}.{k}") for k in ("lora_a", "lora_b")}
    rank = adapter.rank
    for (name, array), shape in zip(weights.items(), kind.shapes(module, rank), strict=True):
        if array is None:
            faults.append(f"{path}.{name}: missing in the adapter")
        elif tuple(array.shape) != shape:
            faults.append(f"{path}.{name}: adapter {tuple(array.shape)}, base {shape}")
    layer = kind(module, rank, adapter.scale, 0.0)
    for name, array in weights.items():
        layer[name] = array
    return layer


def check_whole_weights(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Raise AdapterError if the weights of a "full" adapter do not fit this bare model."""
    own = dict(tree_flatten(model.parameters()))
    faults = [
        f"{name}: adapter {tuple(array.shape)}, base "
        + (str(tuple(own[name].shape)) if name in own else "has no such weight")
        for name, array in weights.items()
        if name not in own or own[name].shape != array.shape
    ]
    faults += [
        f"{name}: the base's is quantized"
        for name in weights
        if name in own and not mx.issubdtype(own[name].dtype, mx.floating)
    ]
    if faults:
        raise AdapterError("adapter does not fit this base:\n  " + "\n  ".join(faults[:12]))


def _attach_full(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    check_whole_weights(model, weights)
    own = dict(tree_flatten(model.parameters()))
    model._mlxlora_replaced = _Replaced({name: own[name] for name in weights})
    model.load_weights(list(weights.items()), strict=False)


def _misfit(adapter: Adapter, faults: list[str]) -> str:
    shown = "\n".join(f"  {fault}" for fault in faults[:12])
    more = f"\n  and {len(faults) - 12} more" if len(faults) > 12 else ""
    name = (adapter.provenance.get("base") or {}).get("name")
    where = f"\nIt was trained on {name}; load that base." if name else ""
    return f"adapter does not fit this base:\n{shown}{more}{where}"


def _pad(array: mx.array, shape: tuple[int, ...]) -> mx.array:
    return mx.pad(array, [(0, want - have) for want, have in zip(shape, array.shape, strict=True)])


def _block_prefixes(model: nn.Module, blocks: int | tuple[int, ...]) -> list[str]:
    """Path prefixes of the chosen blocks: 0 all, n the last n, or a list of numbers."""
    own = {id(block): number for number, block in enumerate(model.layers)}
    prefixes = {
        own[id(m)]: path + "." for path, m in model.named_modules() if id(m) in own and path
    }
    count = len(prefixes)
    if isinstance(blocks, int):
        if not 0 <= blocks <= count:
            raise ConfigError(f"lora.blocks = {blocks}, but this model has {count} blocks")
        wanted = range(count - blocks if blocks else 0, count)
        return [prefixes[number] for number in wanted]
    wrong = [number for number in blocks if number not in prefixes]
    if wrong:
        raise ConfigError(f"lora.blocks: {wrong} are not among this model's 0 to {count - 1}")
    return [prefixes[number] for number in blocks]


def _router(path: str) -> bool:
    """Routers choose experts; changing them moves rows between experts in jumps.

    Some families keep the router's layer one level down: mlp.gate.wg, router.proj.
    """
    return not ROUTERS.isdisjoint(path.split("."))


def _matches(path: str, target: str) -> bool:
    """A pattern matches the whole path; a plain name the path's last parts."""
    if any(c in target for c in "*?["):
        return fnmatch.fnmatchcase(path, target)
    return path == target or path.endswith("." + target)


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((v for pattern, v in patterns.items() if _matches(path, pattern)), default)


def _unmatched_patterns(config: LoraConfig, paths: list[str]) -> None:
    for name, patterns in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        for pattern in patterns:
            if not any(_matches(path, pattern) for path in paths):
                raise ConfigError(f"lora.{name}_pattern: {pattern!r} matches no adapted module")


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key by which block 10 comes after block 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]
