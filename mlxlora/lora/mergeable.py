"""Whether adapters can be merged, and if not, why: each fault, with the adapter's name."""

from collections.abc import Iterator, Sequence

from mlxlora.errors import AdapterError
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.layers import LoRALinear, LoRASwitchLinear, LowRank
from mlxlora.lora.provenance import COMPARED
from mlxlora.lora.targets import natural

Named = Sequence[tuple[str, Adapter]]

# What the number of axes of lora_a tells. An embedding is taken for a linear layer: its delta is
# the transpose, and no method of merging minds.
KINDS: dict[int, type[LowRank]] = {2: LoRALinear, 3: LoRASwitchLinear}


def check(named: Named, *, force: bool = False) -> None:
    """Raise AdapterError unless all are low-rank factors over the same layers of one base.

    force: whatever their bases.
    """
    faults = [f"{name} {why}" for name, adapter in named if (why := _more(adapter))]
    if faults:
        raise AdapterError(
            _lines("only low-rank factors can be merged:", faults)
            + "\nFuse such an adapter into its base (mlxlora fuse), and merge the others."
        )
    faults = [] if force else list(_differences(named))
    if faults:
        raise AdapterError(
            _lines("the adapters were trained on different bases:", faults)
            + "\nMerge adapters of one base, or pass --force."
        )
    faults = list(_misfits(named))
    if faults:
        raise AdapterError(_lines("the adapters are not of one model's layers:", faults))


def check_ranks(named: Named, able: Sequence[str]) -> None:
    """Raise AdapterError unless all have one rank; able: methods that need not have it."""
    if len({adapter.rank for _, adapter in named}) > 1:
        faults = [f"{name} has rank {adapter.rank}" for name, adapter in named]
        raise AdapterError(
            _lines("the adapters differ in rank:", faults)
            + f"\nThis method needs one rank; {' and '.join(able)} do not."
        )


def paths(named: Named) -> list[str]:
    """Of the modules that any of them has."""
    return sorted({path for _, adapter in named for path in adapter.modules}, key=natural)


def _more(adapter: Adapter) -> str:
    """What an adapter is besides low-rank factors, or ''."""
    if adapter.method == "full":
        return "replaces every weight of its base: there are no factors in it"
    if adapter.method == "dora":
        return f"is DoRA, whose magnitudes rescale whole weights: {_few(adapter.modules)}"
    if adapter.whole:
        return f"holds weights that were trained whole: {_few(list(adapter.whole))}"
    return ""


def _differences(named: Named) -> Iterator[str]:
    """What sets bases apart from that of the first adapter that tells of one."""
    told = [(name, base) for name, one in named if (base := one.provenance.get("base"))]
    for name, base in told[1:]:
        first, reference = told[0]
        for key, label in COMPARED.items():
            ours, theirs = reference.get(key), base.get(key)
            if None not in (ours, theirs) and ours != theirs:
                yield f"{label}: {first} has {ours[:40]}, {name} has {theirs[:40]}"


def _misfits(named: Named) -> Iterator[str]:
    for path in paths(named):
        shapes = []
        for name, adapter in named:
            own = adapter.tensors(path)
            shape = _shape(adapter, path) if own else None
            if shape:
                shapes.append((name, shape))
            elif own:
                both = " and ".join(str(tuple(array.shape)) for array in own.values())
                yield f"{path}: {both} in {name} are no factors of its rank {adapter.rank}"
        for name, shape in shapes[1:]:
            first, reference = shapes[0]
            if shape != reference:
                yield f"{path}: {first} is over weights {reference}, {name} over {shape}"


def _shape(adapter: Adapter, path: str) -> tuple[int, ...] | None:
    """(..., out, in) of the weight that a module's factors are over; None if they are none."""
    a, b = adapter.tensors(path).values()
    if a.ndim != b.ndim or a.ndim not in KINDS:
        return None
    left, right = KINDS[a.ndim].sides(a, b)
    if left.shape[:-2] != right.shape[:-2] or {left.shape[-1], right.shape[-2]} != {adapter.rank}:
        return None
    return (*left.shape[:-1], right.shape[-1])


def _lines(head: str, faults: Sequence[str]) -> str:
    more = [f"and {len(faults) - 12} more"] if len(faults) > 12 else []
    return "\n  ".join([head, *faults[:12], *more])


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:80] for name in names[:3]) + more
