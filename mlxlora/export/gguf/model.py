"""Base + adapter as one GGUF file, for llama.cpp and what is built on it.

The file is laid out first, from shapes alone; then each tensor of the walk (merged.py) is put in
its place, so memory holds one layer and a few rows of it. Format: ggml's docs/gguf.md, by way of
the gguf package.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from mlxlora.base import Base, open_frozen, open_model, open_tokenizer
from mlxlora.errors import ExportError
from mlxlora.export import shards
from mlxlora.export.fidelity import Fidelity
from mlxlora.export.gguf import kinds
from mlxlora.export.gguf.families import Tensor, family_of
from mlxlora.export.gguf.keys import shape_of
from mlxlora.export.gguf.layout import Layout, file_tensors
from mlxlora.export.gguf.tokenizer import vocabulary
from mlxlora.export.merged import Merged
from mlxlora.export.on_demand import Fetch, fetching
from mlxlora.export.proof import PROOF, Proof, save
from mlxlora.files import atomic_file, refuse_existing
from mlxlora.lora.adapter import Adapter
from mlxlora.model_files import find

REMEDY = "--quant q8_0 keeps more, --quant f32 everything"


@dataclass
class Written:
    """What write() wrote."""

    path: str
    bytes: int
    quant: str
    tensors: int
    family: str
    fidelity: Fidelity | None = None
    notes: list[str] = field(default_factory=list)  # what is not as one might think


def write(
    model: str | Path | Base,
    adapter: Adapter | None,
    out: str | Path,
    quant: str = "f16",
    *,
    proof: Proof | None = PROOF,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Written:
    """Write one file, whole or not at all.

    quant: a name in kinds.QUANTS. proof: what it is measured by; the figures lie beside the
    file, as NAME.fidelity.json. force: an adapter of another base too. Raises ExportError
    for a family, tokenizer or number that the format cannot hold, AdapterError, ModelError.
    """
    kind, path = kinds.known(quant), Path(out)
    refuse_file(path)
    merged = Merged.of(model, adapter, force=force, trust_remote_code=trust_remote_code)
    layout = Layout(merged.model, merged.config, kind)
    tokenizer = open_tokenizer(merged.source, merged.config, trust_remote_code)
    vocab = vocabulary(tokenizer, layout.rows)
    layout.writer.add_name(name_of(model))
    layout.writer.add_vocab_size(layout.rows)
    vocab.add_to(layout.writer)
    check_room(path, layout.bytes)
    with atomic_file(path) as file:
        total = layout.write(file, merged.tensors())
        fidelity = None
        if proof is not None:
            file.flush()
            again = Merged(merged.source, adapter, trust_remote_code=trust_remote_code)
            opened = partial(written, Path(file.name), merged.source, trust_remote_code)
            fidelity = proof.of(again, opened, REMEDY)
    # Not sooner: no figures of a file that did not come to be; nor those of one that was here.
    figures = path.with_name(f"{path.name.removesuffix('.gguf')}.fidelity.json")
    figures.unlink(missing_ok=True)
    if fidelity is not None:
        save(fidelity, figures)
    notes = layout.notes + vocab.notes
    if "vision_config" in merged.config:
        notes.append("only the language model is written; what sees images is not")
    return Written(str(path), total, quant, len(layout.slots), layout.family_name, fidelity, notes)


def written(path: Path, source: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model in source with the weights of a file that write() made of it, layer by layer."""
    model = open_frozen(source, trust_remote_code)[0]
    return fetching(model, _fetches(path, source, trust_remote_code))


def read_back(
    path: str | Path, model: str | Path | Base, *, trust_remote_code: bool = False
) -> Iterator[tuple[str, mx.array]]:
    """The tensors of a file that write() wrote of this model, by mlx-lm's names, in float32.

    What llama.cpp computes with, as MLX would: unpacked, unpermuted.
    """
    source = model.path if isinstance(model, Base) else find(model)[0]
    for name, fetch in _fetches(Path(path), source, trust_remote_code).items():
        yield name, fetch()


def _fetches(path: Path, source: Path, trust_remote_code: bool) -> dict[str, Fetch]:
    """By name, what reads a tensor of the file."""
    bare, config = open_model(source, trust_remote_code=trust_remote_code)
    _, family = family_of(config)
    stored = {tensor.name: tensor for tensor in GGUFReader(str(path)).tensors}

    def fetch(tensor: Tensor, size: tuple[int, ...]) -> mx.array:
        found = stored[tensor.name]
        numbers = dequantize(np.asarray(found.data), found.tensor_type).reshape(size)
        return tensor.restored(mx.array(numbers.astype(np.float32)))

    placed = file_tensors(bare, family, shape_of(bare, config))
    return {name: partial(fetch, tensor, size) for name, (tensor, size) in placed.items()}


def refuse_file(path: Path) -> None:
    """Raise ExportError if path is taken, by an empty directory too."""
    refuse_existing(path)
    if path.is_dir():
        raise ExportError(f"{path} is a directory; --out wants the name of a file, say model.gguf")


def check_room(path: Path, size: int) -> None:
    """Raise ExportError if the disk has no room for so many bytes and a tokenizer."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    shards.check_room(there, size, path)


def name_of(model: str | Path | Base) -> str:
    """What a model is called: the end of its Hub id, or its directory's name."""
    given = model.identity.name if isinstance(model, Base) else str(model)
    return Path(given).name or Path(given).resolve().name
