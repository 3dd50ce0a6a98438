"""Adapters made by Hugging Face PEFT, and by what builds on it (TRL, Unsloth, axolotl).

read() makes an Adapter of such a directory, over the base it is for. What the tensors say is
used, as the config says it would be by PEFT; whatever cannot be placed, does not fit or would
mean something else here is refused by name. Pickles are never opened, and neither torch nor
PEFT is needed. Writing them is export/peft.py.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxlora.base import Base
from mlxlora.errors import AdapterError
from mlxlora.files import hash_file
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.layers import LoRAEmbedding, LowRank, layer_for, weight_shape
from mlxlora.lora.names import DOWN, GATE, HEADS, OLD_EXPERTS, ONE_EXPERT, UP, Names
from mlxlora.lora.peft_config import PeftConfig, read_peft_config
from mlxlora.lora.peft_experts import INTERLEAVED, Fused, fused
from mlxlora.lora.peft_tensors import (
    EMBEDDING_A,
    EMBEDDING_B,
    MAGNITUDE,
    A,
    B,
    Found,
    Tensors,
    find_weights,
    read_tensors,
)
from mlxlora.quantized import QUANTIZED, widen
from mlxlora.readers import expanded

# How far a copy of the embedding in the file may be from the base's, row by row, relative to its
# length: rounding to half precision, or to few bits.
SAME, SAME_QUANTIZED = 0.02, 0.4


@dataclass(frozen=True)
class Update:
    """What is added to a weight (..., out, in): scale * left @ right; and its magnitude."""

    left: mx.array  # (..., out, r)
    right: mx.array  # (..., r, in)
    scale: float
    m: mx.array | None = None  # (..., out)

    def equals(self, other: "Update") -> bool:
        pairs = ((self.left, other.left), (self.right, other.right))
        same = all(a.shape == b.shape and bool(mx.array_equal(a, b)) for a, b in pairs)
        return same and self.scale == other.scale


def read(directory: str | Path, base: Base) -> Adapter:
    """The PEFT adapter in this directory, over this base.

    Raises AdapterError naming every tensor or field that cannot be used, and why.
    """
    place = expanded(directory)
    file = find_weights(place)
    config = read_peft_config(place)
    reader = _Reader(base, config)
    reader.take(read_tensors(file))
    if reader.faults:
        raise AdapterError(f"{file} cannot be used over this base:\n{_listed(reader.faults)}")
    told = {"format": "peft", "path": str(directory), "sha256": hash_file(file)}
    told |= {"base": config.base, "peft_version": config.version}
    return reader.adapter({"base": base.identity.to_dict(), "imported": told})


class _Reader:
    """Tensors by transformers' names -> updates and whole weights by this base's paths."""

    def __init__(self, base: Base, config: PeftConfig) -> None:
        self.base, self.config = base, config
        self.names = Names(base.model, base.config)
        self.updates: dict[str, Update] = {}
        self.whole: dict[str, mx.array] = {}
        self.heads: dict[str, Update | mx.array] = {}  # of a head that this base does not have
        self.faults: list[str] = []

    def take(self, tensors: Tensors) -> None:
        experts: dict[tuple[str, str], dict[int, tuple[str, Found]]] = {}
        for (name, _), found in tensors.modules.items():
            one = ONE_EXPERT.fullmatch(name)
            if one is not None:
                leaf = OLD_EXPERTS.get(one["leaf"], one["leaf"])
                experts.setdefault((one["container"], leaf), {})[int(one["number"])] = name, found
            elif name.endswith(".experts"):
                self._fused(name, found)
            else:
                self._module(name, found)
        for (container, leaf), numbered in experts.items():
            self._stacked(container, leaf, numbered)
        for name, array in tensors.whole.items():
            self._whole(name, array)
        for name, array in tensors.tokens.items():
            self._tokens(name, array)
        for name, array in tensors.bases.items():
            self._beneath(name, array)
        if not self.faults:
            self._check_tied()
        if not self.faults and not self.updates and not self.whole:
            self.faults.append("it adapts nothing")

    def adapter(self, provenance: Mapping[str, object]) -> Adapter:
        """One rank and one scale: smaller ranks are padded, other scales are in B."""
        rank = max((u.left.shape[-1] for u in self.updates.values()), default=1)
        scales = Counter(u.scale for u in self.updates.values() if u.scale)
        scale = scales.most_common(1)[0][0] if scales else 0.0
        weights: dict[str, mx.array] = {}
        for path, update in self.updates.items():
            weights |= self._factors(path, update, rank, scale)
        return Adapter(
            "dora" if self.config.dora else "lora",
            {**weights, **self.whole},
            rank,
            scale,
            float(self.config.dropout),
            len(getattr(self.base.model, "layers", ())),
            provenance,
        )

    def _factors(self, path: str, update: Update, rank: int, scale: float) -> dict[str, mx.array]:
        kind = self._kind(path)
        more = rank - update.left.shape[-1]
        left, right = update.left, update.right
        if more:
            left = mx.pad(left, [(0, 0)] * (left.ndim - 1) + [(0, more)])
            right = mx.pad(right, [(0, 0)] * (right.ndim - 2) + [(0, more), (0, 0)])
        a, b = kind.factors(left, right)
        if update.scale != scale:
            b = b * (update.scale / scale)
        named = {"lora_a": a, "lora_b": b, **({} if update.m is None else {"m": update.m})}
        return {f"{path}.{leaf}": mx.contiguous(array) for leaf, array in named.items()}

    def _kind(self, path: str) -> type[LowRank]:
        kind = layer_for(self.names.modules[path])
        assert kind is not None
        return kind

    def _module(self, name: str, found: Found) -> None:
        """A linear layer or an embedding."""
        pair = (EMBEDDING_A, EMBEDDING_B) if EMBEDDING_A in found.factors else (A, B)
        update = self._update(name, found, pair)
        if update is None:
            return
        out, inside = update.left.shape[0], update.right.shape[1]
        path = self.names.here(name, (out, inside))
        if path is None and name.rpartition(".")[2] in HEADS and self.names.tied:
            self.heads[name] = update
        elif path is None:
            self._fault(found, "the base has no such layer")
        elif (self._kind(path) is LoRAEmbedding) != (pair[0] == EMBEDDING_A):
            self._fault(found, f"not the kind of layer that the base has as {path}")
        elif path in self.updates:
            self._fault(found, f"another of its tensors is of {path} too")
        else:
            self._fit(path, found, pair, update)

    def _fit(self, path: str, found: Found, pair: tuple[str, str], update: Update) -> None:
        out, inside = weight_shape(self.names.modules[path])
        rank = update.left.shape[-1]
        shapes: dict[str, tuple[int, ...]] = {A: (rank, inside), B: (out, rank)}
        shapes |= {EMBEDDING_A: (rank, out), EMBEDDING_B: (inside, rank), MAGNITUDE: (out,)}
        wrong = False
        for kind, array in found.factors.items():
            if array.shape != shapes[kind]:
                wrong = True
                self.faults.append(
                    f"{found.tensors[kind]}: adapter {array.shape}, base {shapes[kind]}"
                )
        if pair[0] == EMBEDDING_A and update.m is not None:
            wrong = True
            self._fault(
                found,
                "DoRA over an embedding has one magnitude for each dimension in "
                "PEFT, and here for each token",
                MAGNITUDE,
            )
        if not wrong:
            self.updates[path] = update

    def _update(
        self, name: str, found: Found, pair: tuple[str, str], parameter: str = ""
    ) -> Update | None:
        """The factors of one module or parameter, or None and why in faults."""
        wanted = {*pair, *([MAGNITUDE] if self.config.dora else [])}
        for kind in sorted(wanted ^ found.factors.keys()):
            if kind in wanted:
                self.faults.append(f"{name[:100]}.{kind} is missing")
            else:
                self._fault(
                    found,
                    f"of a kind that use_dora = {str(self.config.dora).lower()} does not have",
                    kind,
                )
        if wanted != found.factors.keys():
            return None
        a, b = (found.factors[kind] for kind in pair)
        key = self._target(name)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            self._fault(found, f"{a.shape} and {b.shape} are no two factors")
        elif key is None:
            self._fault(found, "not among what the config targets, so PEFT would not load it")
        elif a.shape[0] != self.config.rank_of(key):
            self._fault(found, f"of rank {a.shape[0]}, the config says {self.config.rank_of(key)}")
        else:
            left, right = (a.T, b.T) if pair[0] == EMBEDDING_A else (b, a)
            return Update(left, right, self.config.scale_of(key), found.factors.get(MAGNITUDE))
        return None

    def _target(self, name: str) -> str | None:
        """The name by which patterns of rank and alpha go, or None if it is no target."""
        tied = self.config.tied and name.rpartition(".")[2] in HEADS  # by way of the embedding
        if tied or self.config.is_target(name):
            return name
        parameter = f"{name}.weight"
        return parameter if self.config.is_parameter(parameter) else None

    def _stacked(
        self, container: str, leaf: str, numbered: Mapping[int, tuple[str, Found]]
    ) -> None:
        """The experts of one projection, each a module of its own."""
        updates = {n: self._update(name, found, (A, B)) for n, (name, found) in numbered.items()}
        known = {n: update for n, update in updates.items() if update is not None}
        path = self.names.experts(container + ".").get(leaf)
        written, found = next(iter(numbered.values()))
        written = written.rpartition(".")[2]
        if path is None:
            return self._fault(found, "the base has no such experts")
        if len(known) < len(updates):
            return None
        module = self.names.modules[path]
        count, out, inside = weight_shape(module)
        for number, (_, one) in numbered.items():
            a, b = one.factors[A].shape, one.factors[B].shape
            if number >= count or a[1] != inside or b[0] != out:
                self._fault(one, f"adapter {b[0]} x {a[1]}, base {count} of {out} x {inside}")
                return None
        missing = [n for n in range(count) if n not in known]
        lost = [n for n in missing if self.config.is_target(f"{container}.{n}.{written}")]
        if lost:
            self.faults.append(
                f"{container}.{lost[0]}.{written} is missing, as of {len(lost)} of {count} experts"
            )
            return None
        self.updates[path] = _together(module, known)
        return None

    def _fused(self, name: str, found: Found) -> None:
        """The experts of a block as PEFT adapts them through parameters."""
        paths = self.names.experts(name + ".")
        if not {GATE, UP, DOWN} <= paths.keys():
            return self._fault(found, "the base has no such experts")
        if found.factors.keys() != {A, B}:
            return self._fault(found, "experts have lora_A and lora_B, both and no other")
        block = {leaf: self.names.modules[path] for leaf, path in paths.items()}
        made = fused(found.factors[A], found.factors[B], block, self.config.version)
        if not isinstance(made, Fused):
            return self._fault(found, made)
        key, rank = f"{name}.{made.parameter}", made.right.shape[1]
        if not self.config.is_parameter(key):
            return self._fault(found, f"{made.parameter} is not among target_parameters")
        if rank != self.config.rank_of(key):
            wanted = self.config.rank_of(key)
            return self._fault(found, f"of rank {rank}, the config says {wanted}")
        family = str(self.base.config.get("model_type"))
        for leaf, (left, right) in made.leaves(family in INTERLEAVED).items():
            self.updates[paths[leaf]] = Update(left, right, self.config.scale_of(key))
        return None

    def _whole(self, name: str, array: mx.array) -> None:
        """A weight that was trained, or saved, whole: of the embedding or the head."""
        module, _, leaf = name.rpartition(".")
        path = self.names.here(module, array.shape)
        if path is None and module.rpartition(".")[2] in HEADS and self.names.tied:
            self.heads[name] = array
        elif path is None or not self._is_outer(path):
            self.faults.append(
                f"{name}: a whole weight can be imported of the embedding and the head alone"
            )
        elif path in self.updates:
            self.faults.append(f"{name}: {path} has low-rank factors as well")
        else:
            module_here = self.names.modules[path]
            own = (
                weight_shape(module_here)
                if leaf == "weight"
                else module_here.get(leaf, _NONE).shape
            )
            if array.shape != own:
                self.faults.append(f"{name}: adapter {array.shape}, base {own or 'has none'}")
            else:
                self.whole[f"{path}.{leaf}"] = array

    def _is_outer(self, path: str) -> bool:
        return path == self.names.embedding or path.rpartition(".")[2] in HEADS

    def _tokens(self, name: str, rows: mx.array) -> None:
        """Trained rows of an embedding: the embedding whole, with these rows."""
        path = self.names.here(name)
        found = (t for end, t in self.config.tokens.items() if not end or name.endswith(end))
        tokens = next(found, ())
        if path is None or self._kind(path) is not LoRAEmbedding or path in self.updates:
            self.faults.append(f"{name}: trained tokens can be imported of a bare embedding alone")
            return
        weight = widen(self.names.modules[path])
        count, width = weight.shape
        if rows.shape != (len(tokens), width) or any(t >= count for t in tokens):
            self.faults.append(
                f"{name}: trained rows {rows.shape} for {len(tokens)} trainable_token_indices, "
                f"base {weight.shape}"
            )
            return
        weight[mx.array(tokens)] = rows
        self.whole[f"{path}.weight"] = weight

    def _beneath(self, name: str, saved: mx.array) -> None:
        """A copy of the weight beneath low-rank factors, which PEFT saves of an embedding.

        If it is not the base's own (rows of new tokens), both together are a whole weight.
        """
        path = self.names.here(name, saved.shape)
        if path is None:
            if not (self.names.tied and name.rpartition(".")[2] in HEADS):
                self.faults.append(f"{name}.base_layer.weight: the base has no such layer")
            return
        module = self.names.modules[path]
        if saved.shape != weight_shape(module):
            self.faults.append(
                f"{name}.base_layer.weight: adapter {saved.shape}, base {weight_shape(module)}"
            )
            return
        own = widen(module)
        apart = mx.linalg.norm(saved - own, axis=-1)
        near = SAME_QUANTIZED if isinstance(module, QUANTIZED) else SAME
        if mx.all(apart <= near * mx.linalg.norm(own, axis=-1) + 1e-6).item():
            return
        update = self.updates.pop(path, None)
        if update is not None:
            if update.m is not None:
                self.faults.append(f"{name}.base_layer.weight: not the base's, under DoRA")
            saved = saved + update.scale * (update.left @ update.right)
        self.whole[f"{path}.weight"] = saved

    def _check_tied(self) -> None:
        """Where head and embedding are one weight, what is done to one is done to the other.

        PEFT adapts them apart; here both or none can change, and alike.
        """
        path = self.names.embedding
        if not self.names.tied or path is None:
            return
        for name, head in self.heads.items():
            if isinstance(head, Update):
                own = self.updates.get(path)
                alike = own is not None and own.equals(head)
            else:
                weight = self.whole.get(f"{path}.weight")
                alike = weight is not None and bool(mx.array_equal(weight, head))
            if not alike:
                self.faults.append(
                    f"{name}: in this base the head is the embedding, so the head cannot have an "
                    "update of its own"
                )
        apart = path in self.updates or (f"{path}.weight" in self.whole and self._saved_apart(path))
        if apart and not self.heads and not self.config.tied:
            self.faults.append(
                f"{path}: in this base the head is the embedding. PEFT (without "
                "ensure_weight_tying) changes the embedding alone, which cannot be done here"
            )

    def _saved_apart(self, path: str) -> bool:
        """Whether the whole embedding is a module of its own to PEFT (modules_to_save)."""
        return any(self.names.here(one) == path or path.endswith(one) for one in self.config.whole)

    def _fault(self, found: Found, says: str, *kinds: str) -> None:
        shown = [found.tensors[kind] for kind in kinds or found.tensors]
        self.faults.append(f"{', '.join(name[:120] for name in shown)}: {says}")


_NONE = mx.array([])[:0]


def _together(module: nn.Module, known: Mapping[int, Update]) -> Update:
    """The updates of single experts as one of all; experts without one are not changed."""
    count, out, inside = weight_shape(module)
    rank = max(update.left.shape[-1] for update in known.values())
    scale = Counter(update.scale for update in known.values()).most_common(1)[0][0] or 1.0
    nothing = Update(mx.zeros((out, 0)), mx.zeros((0, inside)), scale)
    lefts, rights = [], []
    for number in range(count):
        one = known.get(number, nothing)
        more = rank - one.left.shape[-1]
        left = one.left if one.scale == scale else one.left * (one.scale / scale)
        lefts.append(mx.pad(left, [(0, 0), (0, more)]))
        rights.append(mx.pad(one.right, [(0, more), (0, 0)]))
    m = None
    if any(update.m is not None for update in known.values()):
        lengths = mx.linalg.norm(widen(module), axis=-1)
        ms = [known[n].m if n in known else lengths[n] for n in range(count)]
        m = mx.stack([one for one in ms if one is not None])
    return Update(mx.stack(lefts), mx.stack(rights), scale, m)


def _listed(faults: list[str]) -> str:
    more = [f"and {len(faults) - 12} more"] if len(faults) > 12 else []
    return "\n".join(f"  {line}" for line in [*faults[:12], *more])
