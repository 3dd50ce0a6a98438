"""The low-rank factors of a PEFT file in their places in a base.

Every fault is collected; each names its tensors, and what of the base they do not fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlxlora.base import Base
from mlxlora.lora.layers import LoRAEmbedding, layer_for, weight_shape
from mlxlora.lora.names import DOWN, GATE, HEADS, OLD_EXPERTS, ONE_EXPERT, UP, Names
from mlxlora.lora.peft_config import PeftConfig
from mlxlora.lora.peft_experts import INTERLEAVED, Fused, fused
from mlxlora.lora.peft_tensors import EMBEDDING_A, EMBEDDING_B, MAGNITUDE, A, B, Found
from mlxlora.lora.updates import Update, together

Modules = Mapping[tuple[str, int], Found]


@dataclass
class Placed:
    """What was found a place for, by paths of the base, and what was not, and why."""

    base: Base
    config: PeftConfig
    names: Names
    updates: dict[str, Update] = field(default_factory=dict)
    whole: dict[str, mx.array] = field(default_factory=dict)  # weights, by name
    heads: dict[str, Update | mx.array] = field(default_factory=dict)  # where there is none here
    faults: list[str] = field(default_factory=list)

    def fault(self, found: Found, says: str, *kinds: str) -> None:
        names = [found.tensors[kind][:120] for kind in kinds or found.tensors]
        self.faults.append(f"{', '.join(names)}: {says}")

    def is_embedding(self, path: str) -> bool:
        return layer_for(self.names.modules[path]) is LoRAEmbedding

    def is_missing_head(self, name: str) -> bool:
        """Whether it is transformers' head, which here is the embedding."""
        return self.names.tied and is_head(name) and self.names.here(name) is None


def is_head(name: str) -> bool:
    return name.rpartition(".")[2] in HEADS


def place_modules(placed: Placed, modules: Modules) -> None:
    """Give every module's factors their place, experts together."""
    experts: dict[tuple[str, str], dict[int, tuple[str, Found]]] = {}
    for (name, _), found in modules.items():
        one = ONE_EXPERT.fullmatch(name)
        if one is not None:
            leaf = OLD_EXPERTS.get(one["leaf"], one["leaf"])
            experts.setdefault((one["container"], leaf), {})[int(one["number"])] = name, found
        elif name.endswith(".experts"):
            _place_fused(placed, name, found)
        else:
            _place_module(placed, name, found)
    for (container, leaf), numbered in experts.items():
        _place_numbered(placed, container, leaf, numbered)


def _place_module(placed: Placed, name: str, found: Found) -> None:
    """A linear layer or an embedding."""
    pair = (EMBEDDING_A, EMBEDDING_B) if EMBEDDING_A in found.factors else (A, B)
    update = _update(placed, name, found, pair)
    if update is None:
        return
    path = placed.names.here(name, (update.left.shape[0], update.right.shape[1]))
    if path is None and placed.is_missing_head(name):
        placed.heads[name] = update
    elif path is None or len(weight_shape(placed.names.modules[path])) != 2:
        placed.fault(found, "the base has no such layer")
    elif placed.names.rewritten(path):
        placed.fault(found, "mlx-lm has other numbers in this layer's weight than transformers")
    elif placed.is_embedding(path) != (pair[0] == EMBEDDING_A):
        placed.fault(found, f"the base's {path} is a layer of another kind")
    elif path in placed.updates:
        placed.fault(found, f"there are other factors of {path}")
    elif _fits(placed, path, found, update):
        placed.updates[path] = update


def _fits(placed: Placed, path: str, found: Found, update: Update) -> bool:
    out, inside = weight_shape(placed.names.modules[path])
    shapes: dict[str, tuple[int, ...]] = {
        A: (update.rank, inside),
        B: (out, update.rank),
        EMBEDDING_A: (update.rank, out),
        EMBEDDING_B: (inside, update.rank),
        MAGNITUDE: (out,),
    }
    wrong = [kind for kind, array in found.factors.items() if array.shape != shapes[kind]]
    for kind in wrong:
        placed.fault(found, f"adapter {found.factors[kind].shape}, base {shapes[kind]}", kind)
    if EMBEDDING_A in found.factors and update.m is not None:
        placed.fault(
            found,
            "DoRA over an embedding has one magnitude for each dimension in PEFT, and one for "
            "each token here",
            MAGNITUDE,
        )
        return False
    return not wrong


def _update(placed: Placed, name: str, found: Found, pair: tuple[str, str]) -> Update | None:
    """The factors of one module, or None and why in faults."""
    config = placed.config
    wanted = {*pair, *([MAGNITUDE] if config.dora else [])}
    for kind in sorted(wanted ^ found.factors.keys()):
        if kind in wanted:
            placed.faults.append(f"{name[:100]}.{kind} is missing")
        else:
            placed.fault(found, f"not what an adapter with use_dora = {config.dora} has", kind)
    if wanted != found.factors.keys():
        return None
    a, b = (found.factors[kind] for kind in pair)
    key = _target(config, name)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        placed.fault(found, f"{a.shape} and {b.shape} are no two factors", *pair)
    elif key is None:
        placed.fault(found, "not among what the config targets, so PEFT would not load it")
    elif a.shape[0] != config.rank_of(key):
        wanted_rank = config.rank_of(key)
        placed.fault(found, f"of rank {a.shape[0]}, and the config says {wanted_rank}", *pair)
    else:
        left, right = (a.T, b.T) if pair[0] == EMBEDDING_A else (b, a)
        return Update(left, right, config.scale_of(key), found.factors.get(MAGNITUDE))
    return None


def _target(config: PeftConfig, name: str) -> str | None:
    """The name by which patterns of rank and alpha go, or None if it is no target."""
    by_way_of_embedding = config.tied and is_head(name)
    if by_way_of_embedding or config.is_target(name):
        return name
    parameter = f"{name}.weight"
    return parameter if config.is_parameter(parameter) else None


def _place_numbered(
    placed: Placed, container: str, leaf: str, numbered: Mapping[int, tuple[str, Found]]
) -> None:
    """The experts of one projection, each a module of its own.

    One that the config does not target is not changed; one that it does and that is missing
    (expert-parallel training saves those of one process) is a fault.
    """
    made = {n: _update(placed, name, found, (A, B)) for n, (name, found) in numbered.items()}
    updates = {n: update for n, update in made.items() if update is not None}
    path = placed.names.experts(container + ".").get(leaf)
    first, found = next(iter(numbered.values()))
    if path is None:
        return placed.fault(found, "the base has no such experts")
    if len(updates) < len(made):
        return None
    module = placed.names.modules[path]
    count, out, inside = weight_shape(module)
    for number, update in updates.items():
        sizes = update.left.shape[0], update.right.shape[1]
        if number >= count or sizes != (out, inside):
            has = f"expert {number} of {sizes[0]} x {sizes[1]}"
            return placed.fault(
                numbered[number][1], f"adapter {has}, base {count} of {out} x {inside}"
            )
    written = first.rpartition(".")[2]
    names = [f"{container}.{n}.{written}" for n in range(count) if n not in updates]
    lost = [name for name in names if placed.config.is_target(name)]
    if lost:
        placed.faults.append(f"{lost[0][:100]}: missing, as are {len(lost)} of {count} experts")
        return None
    placed.updates[path] = together(module, updates)
    return None


def _place_fused(placed: Placed, name: str, found: Found) -> None:
    """The experts of a block as PEFT adapts them through parameters."""
    config, paths = placed.config, placed.names.experts(name + ".")
    if not {GATE, UP, DOWN} <= paths.keys():
        return placed.fault(found, "the base has no such experts")
    if found.factors.keys() != {A, B}:
        return placed.fault(found, "experts have lora_A and lora_B, both and no other")
    block = {leaf: placed.names.modules[path] for leaf, path in paths.items()}
    made = fused(found.factors[A], found.factors[B], block, config.version)
    if not isinstance(made, Fused):
        return placed.fault(found, made)
    key, rank = f"{name}.{made.parameter}", made.right.shape[1]
    if not config.is_parameter(key):
        return placed.fault(found, f"{made.parameter} is not among target_parameters")
    if rank != config.rank_of(key):
        return placed.fault(found, f"of rank {rank}, and the config says {config.rank_of(key)}")
    family = str(placed.base.config.get("model_type"))
    for leaf, (left, right) in made.leaves(family in INTERLEAVED).items():
        placed.updates[paths[leaf]] = Update(left, right, config.scale_of(key))
    return None
