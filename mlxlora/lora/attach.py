"""Putting adapters into a model and taking them out again, exactly.

attach() puts in one adapter, or several by name, of which one acts: switch() changes which, by
assigning modules that are ready. detach() restores the base, whose own arrays are never written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import mlx.nn as nn

from mlxlora.base import Base
from mlxlora.errors import AdapterError
from mlxlora.lora.adapter import Adapter, differences
from mlxlora.lora.fit import check_fit
from mlxlora.lora.layers import LowRank, layer_for
from mlxlora.lora.targets import natural
from mlxlora.lora.whole import Part, fitted

ONLY = "adapter"  # the name of one that was given none


@dataclass
class _Attached:
    """What the model remembers while something is attached to it."""

    named: dict[str, Part] = field(default_factory=dict)
    active: str | None = None
    own: Part = Part()  # the base's, where whole weights stand instead


def attach(
    model: nn.Module | Base, adapter: Adapter | Mapping[str, Adapter], *, force: bool = False
) -> None:
    """Put a trained adapter into the model, or several by name, of which the first acts.

    What was attached is taken out. Given a Base, it must be the one the adapters were trained
    on unless force is True. Raises AdapterError naming every tensor that does not fit, or what
    differs between the bases; then nothing is attached.
    """
    named = {ONLY: adapter} if isinstance(adapter, Adapter) else dict(adapter)
    bare = _bare(model)
    detach(bare)
    if isinstance(model, Base) and not force:
        for one in named.values():
            check_base(model, one)
    parts = {name: part_of(bare, one) for name, one in named.items()}
    _remembered(bare).named = parts
    switch(bare, next(iter(parts), None))
    bare.eval()


def switch(model: nn.Module | Base, name: str | None) -> None:
    """Let the attached adapter of this name act, or none of them (None).

    Raises AdapterError for a name that is not attached.
    """
    bare = _bare(model)
    state = _remembered(bare)
    if name is not None and name not in state.named:
        known = ", ".join(state.named) or "none"
        raise AdapterError(f"no adapter {name!r} is attached; attached: {known}")
    _take_out(bare)
    if name is not None:
        put(bare, state.named[name])
    state.active = name


def attached(model: nn.Module | Base) -> tuple[tuple[str, ...], str | None]:
    """(names of the attached adapters, the one that acts)."""
    state = getattr(_bare(model), "_mlxlora", _Attached())
    return tuple(state.named), state.active


def detach(model: nn.Module | Base) -> None:
    """Take every adapter out; the model is the base again, with the base's arrays."""
    bare = _bare(model)
    _take_out(bare)
    bare.freeze()
    if hasattr(bare, "_mlxlora"):
        del bare._mlxlora


def low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """(path, layer) of every low-rank layer in the model, in order of path."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, LowRank)]
    return iter(sorted(found, key=lambda pair: natural(pair[0])))


def put(model: nn.Module, part: Part) -> None:
    """Put a part into a bare model, which remembers what stood there."""
    stood = part.swap_into(model)
    # A low-rank layer holds its base itself.
    whole = {p: m for p, m in stood.modules.items() if not isinstance(part.modules[p], LowRank)}
    _remembered(model).own = Part(whole, stood.weights)


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


def _bare(model: nn.Module | Base) -> nn.Module:
    return model.model if isinstance(model, Base) else model


def _remembered(model: nn.Module) -> _Attached:
    if not hasattr(model, "_mlxlora"):
        model._mlxlora = _Attached()
    return model._mlxlora  # type: ignore[no-any-return]


def _take_out(model: nn.Module) -> None:
    """Let the base's own stand everywhere."""
    state = getattr(model, "_mlxlora", None)
    if state is not None and state.named:  # what stands where is known
        acting = state.named[state.active].modules.items() if state.active is not None else ()
        layers = [(path, m) for path, m in acting if isinstance(m, LowRank)]
    else:
        layers = list(low_rank_layers(model))
        model.freeze()
    Part({path: layer.base for path, layer in layers}).swap_into(model)
    if state is not None:
        state.own.swap_into(model)
        state.own = Part()


def part_of(model: nn.Module, adapter: Adapter) -> Part:
    """The adapter's layers and weights over this bare model. Raises AdapterError."""
    modules = dict(model.named_modules())
    check_fit(modules, adapter)
    layers = {path: _layer(modules[path], adapter, path) for path in adapter.modules}
    whole = fitted(model, adapter.whole)
    return Part({**layers, **whole.modules}, whole.weights)


def _layer(module: nn.Module, adapter: Adapter, path: str) -> LowRank:
    """A low-rank layer over module with the adapter's tensors."""
    kind = layer_for(module)
    assert kind is not None  # it fits
    layer = kind(module, adapter.rank, adapter.scale, 0.0)
    for name, array in adapter.tensors(path).items():
        layer[name] = array
    layer.settle()
    layer.freeze()
    return layer
