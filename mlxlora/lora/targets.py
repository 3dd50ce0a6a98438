"""Which modules of a model: targets, blocks and patterns, as the options name them."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.config import LoraConfig
from mlxlora.errors import ConfigError
from mlxlora.lora.layers import EXPERTS, LINEAR, layer_for

ROUTERS = {"gate", "router", "shared_expert_gate"}  # names of modules that choose experts
ALL_LINEAR = "all-linear"


def targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that get low-rank layers, in order: config.targets in config.blocks.

    "all-linear" is every linear layer of the blocks, experts included, but no router,
    embedding or head, nor what config.train_also trains whole. Raises ConfigError for a target
    that matches nothing.
    """
    prefixes = _block_prefixes(model, config.blocks)
    paths = {path: m for path, m in model.named_modules() if layer_for(m) is not None}
    inside = {p for p in paths if p.startswith(tuple(prefixes))}
    whole = set(trained_whole(model, config))
    chosen: set[str] = set()
    for target in config.targets:
        if target == ALL_LINEAR:
            matched = {
                p for p in inside - whole if isinstance(paths[p], LINEAR + EXPERTS) and linear(p)
            }
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
        chosen |= matched
    return sorted(chosen, key=natural)


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
    """Sort key by which block 10 comes after block 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]


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
