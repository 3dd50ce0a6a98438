"""An adapter as GGUF: laid over a base in llama.cpp (--lora), or by Ollama (ADAPTER).

For every adapted tensor W, <name>.lora_a (r, in) and <name>.lora_b (out, r), and once
adapter.lora.alpha: W + alpha / r * lora_b lora_a, read in llama.cpp's llama-adapter.cpp. Rows of
lora_b stand as the base's rows do in the file (families.py); experts are stacked; of the
embedding lora_a is (vocabulary, r) and lora_b (dims, r).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGUFWriter
from gguf.gguf_writer import WriterState

from mlxlora.base import Base
from mlxlora.errors import ExportError
from mlxlora.export.gguf.families import family_of
from mlxlora.export.gguf.keys import shape_of
from mlxlora.export.gguf.layout import file_tensors
from mlxlora.export.gguf.model import check_room, name_of, refuse_file
from mlxlora.export.merged import Merged
from mlxlora.files import atomic_file
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.layers import EMBEDDING, EXPERTS, LINEAR, layer_for

EMBEDDED = "token_embd.weight"
REMEDY = "fuse the adapter instead: --format gguf with --adapter"


@dataclass
class Written:
    """What write() wrote."""

    path: str
    bytes: int
    layers: int
    rank: int
    alpha: float
    family: str
    notes: list[str] = field(default_factory=list)


def write(
    model: str | Path | Base,
    adapter: Adapter,
    out: str | Path,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Written:
    """Write one file, whole or not at all. The tensors are float32.

    Raises ExportError naming the layers that llama.cpp cannot adapt, AdapterError for an adapter
    of another base unless forced.
    """
    path = Path(out)
    refuse_file(path)
    merged = Merged.of(model, adapter, force=force, trust_remote_code=trust_remote_code)
    family_name, family = family_of(merged.config)
    writer = GGUFWriter(None, family.arch_name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name_of(model))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha or float(adapter.rank))
    total = 0
    for name, array in _tensors(merged, adapter):
        writer.add_tensor(name, array)
        total += array.nbytes
    check_room(path, total)
    with atomic_file(path) as file:
        writer.fout, writer.state = [cast(Any, file)], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return Written(
        str(path),
        path.stat().st_size,
        len(adapter.modules),
        adapter.rank,
        adapter.alpha,
        family_name,
    )


def _tensors(merged: Merged, adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """The factors by their names in the file. Raises ExportError for what has no place there."""
    if adapter.method == "full" or not adapter.modules:
        raise ExportError("an adapter of every weight is no LoRA; " + REMEDY)
    _, family = family_of(merged.config)
    shape = shape_of(merged.model, merged.config)
    places = file_tensors(merged.model, family, shape)
    tied = not any(tensor.name == "output.weight" for tensor, _ in places.values())
    faults = [f"{name}: trained whole" for name in adapter.whole]
    for path in adapter.modules:
        module, place = merged.modules[path], places[f"{path}.weight"][0].name
        if "m" in adapter.tensors(path):
            faults.append(f"{path}: DoRA")
        elif not isinstance(module, (*LINEAR, *EXPERTS, *EMBEDDING)):
            faults.append(f"{path}: a layer of class {type(module).__name__}")
        elif place == EMBEDDED and tied:
            faults.append(f"{path}: the embedding, which is the head of this model too")
    if faults:
        more = [f"and {len(faults) - 12} more"] if len(faults) > 12 else []
        raise ExportError(
            "llama.cpp has no adapters for\n  "
            + "\n  ".join([*faults[:12], *more])
            + f"\n{REMEDY[0].upper()}{REMEDY[1:]}"
        )
    factor = 1.0 if adapter.alpha else 0.0  # an alpha of 0 means none there
    for path in adapter.modules:
        tensor, own = places[f"{path}.weight"][0], adapter.tensors(path)
        kind = layer_for(merged.modules[path])
        assert kind is not None
        left, right = kind.sides(own["lora_a"], own["lora_b"])
        if tensor.name == EMBEDDED:
            a, b = left, right.T
        else:
            a = right if tensor.columns is None else right[..., mx.array(tensor.columns)]
            b = left if tensor.rows is None else left[..., mx.array(tensor.rows), :]
        yield f"{tensor.name}.lora_a", _plain(a)
        yield f"{tensor.name}.lora_b", _plain(b * factor)


def _plain(array: mx.array) -> np.ndarray:
    return np.ascontiguousarray(np.array(array.astype(mx.float32)))
