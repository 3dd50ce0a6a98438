"""Which modules of a model: targets, blocks and patterns, as the options name them."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxlora.config import LoraConfig
from mlxlora.errors import ConfigError
from mlxlora.lora.layers import EXPERTS, LINEAR, layer_for

ROUTERS = {"gate", "router", "shared_expert_gate"}  # names of modules that choose experts
ALL_LINEAR = "all-linear"


def targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that get low-rank layers, in order: config.targets in config.blocks.

    "all-linear" is every linear layer of the blocks, experts included, but no router,
    embedding or head, nor what config.train_also trains whole, nor a layer whose weight the
    model takes itself. Raises ConfigError for a target that matches nothing, or such a layer.
    """
    prefixes = _block_prefixes(model, config.blocks)
    paths = {path: m for path, m in model.named_modules() if layer_for(m) is not None}
    inside = {p for p in paths if p.startswith(tuple(prefixes))}
    whole = set(trained_whole(model, config))
    taken = taken_by_the_model(model, inside)
    chosen: set[str] = set()
    for target in config.targets:
        if target == ALL_LINEAR:
            own = inside - whole - taken
            matched = {p for p in own if isinstance(paths[p], LINEAR + EXPERTS) and linear(p)}
        else:
            matched = {p for p in paths if matches(p, target)}
            if config.blocks != 0:
                matched &= inside
            both = sorted(matched & whole, key=natural)
            if both:
                raise ConfigError(
                    f"{both[0]} is in lora.targets ({target!r}) and in lora.train_also: a module "
                    "is trained whole or by low-rank factors, not both"
                )
        if not matched:
            raise ConfigError(
                f"lora.targets: {target!r} matches no module of this model; it has {_names(paths)}"
            )
        if matched & taken:
            raise ConfigError(
                f"lora.targets: {target!r} matches {min(matched & taken, key=natural)}, whose "
                "weight the model uses without calling the layer, so no low-rank layer fits there"
            )
        chosen |= matched
    return sorted(chosen, key=natural)


def taken_by_the_model(model: nn.Module, paths: Iterable[str]) -> set[str]:
    """Of the layers at these paths, those whose weight the model takes from them itself.

    A low-rank layer in their place would not be seen. Found by a run with stand-ins, whose
    result nobody computes; of a model that does not run so, nothing is known.
    """
    taken: set[str] = set()
    modules = dict(model.named_modules())
    own = {path: modules[path] for path in paths}
    stand_ins = {path: _Watched(layer, partial(taken.add, path)) for path, layer in own.items()}
    was_training = model.training
    model.update_modules(tree_unflatten(list(stand_ins.items())))
    try:
        model.train()  # in which a model reads again what it remembers of its weights
        model(mx.array([[1, 2]]))
    except Exception:  # whatever an architecture raises
        pass
    finally:
        model.update_modules(tree_unflatten(list(own.items())))
        model.train(was_training)
    return taken


class _Watched(nn.Module):
    """In a layer's place: does what it does, keeps its weight, tells when that is read."""

    def __init__(self, layer: nn.Module, tell: Callable[[], None]) -> None:
        super().__init__()
        self._layer, self._tell = layer, tell

    @property
    def weight(self) -> mx.array:
        self._tell()
        return self._layer.weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":  # what the model would put there, it has made of the one it read
            super().__setattr__(name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._layer(*args, **options)


def trained_whole(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that config.train_also chooses, in order.

    Raises ConfigError for a name that matches no module with weights of its own.
    """
    paths = {path for path, module in model.named_modules() if _has_weights(module)}
    chosen: set[str] = set()
    for name in config.train_also:
        matched = {p for p in paths if matches(p, name)}
        if not matched:
            raise ConfigError(
                f"lora.train_also: {name!r} matches no module of this model; it has {_names(paths)}"
            )
        chosen |= matched
    return sorted(chosen, key=natural)


def linear(path: str) -> bool:
    """Whether a linear layer at this path is none that chooses experts.

    Changing a router moves rows between experts in jumps. Some families keep its layer one
    level down: mlp.gate.wg, router.proj.
    """
    return ROUTERS.isdisjoint(path.split("."))


def matches(path: str, target: str) -> bool:
    """A pattern matches the whole path; a plain name the path's last parts."""
    if any(c in target for c in "*?["):
        return fnmatch.fnmatchcase(path, target)
    return path == target or path.endswith("." + target)


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((v for pattern, v in patterns.items() if matches(path, pattern)), default)


def check_patterns(config: LoraConfig, paths: list[str]) -> None:
    """Raise ConfigError for a pattern of rank or alpha that matches none of the paths."""
    for name, patterns in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        for pattern in patterns:
            if not any(matches(path, pattern) for path in paths):
                raise ConfigError(f"lora.{name}_pattern: {pattern!r} matches no adapted module")


def natural(path: str) -> list[tuple[int, str]]:
    """Sort key by which block 10 comes after block 9; for any text, such as a stranger's names."""
    parts = path.split(".")
    return [(int(p), "") if p.isdecimal() and len(p) < 10 else (-1, p) for p in parts]


def _names(paths: Iterable[str]) -> str:
    return ", ".join(sorted({p.rpartition(".")[2] for p in paths}))


def _has_weights(module: nn.Module) -> bool:
    """Whether it is a leaf: arrays of its own and no module inside."""
    return not module.children() and any(isinstance(v, mx.array) for v in module.values())


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
