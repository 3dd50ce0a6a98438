"""Whether an adapter's factors fit the layers of a base; if not, every tensor that does not."""

from collections.abc import Iterator, Mapping

import mlx.nn as nn

from mlxlora.errors import AdapterError
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.layers import layer_for

SHOWN = 12  # faults of a message


def check_fit(modules: Mapping[str, nn.Module], adapter: Adapter) -> None:
    """Raise AdapterError naming the tensors that do not fit these modules of a base, by path."""
    faults = [fault for path in adapter.modules for fault in _faults(modules, adapter, path)]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:SHOWN])
        more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        name = (adapter.provenance.get("base") or {}).get("name")
        where = f"\nIt was trained on {name}; use that base." if name else ""
        raise AdapterError(f"adapter does not fit this base:\n{shown}{more}{where}")


def _faults(modules: Mapping[str, nn.Module], adapter: Adapter, path: str) -> Iterator[str]:
    module = modules.get(path)
    kind = layer_for(module)
    if module is None or kind is None:
        yield f"{path}: the base has no such layer"
        return
    own = adapter.tensors(path)
    for name, shape in kind.shapes(module, adapter.rank).items():
        if name not in own:
            if name != "m" or adapter.method == "dora":
                yield f"{path}.{name}: missing in the adapter"
        elif tuple(own[name].shape) != shape:
            yield f"{path}.{name}: adapter {tuple(own[name].shape)}, base {shape}"
