"""Where everything is in a GGUF file: laid out from shapes alone, before any weight is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState
from mlx.utils import tree_flatten

from mlxlora.errors import ExportError
from mlxlora.export.gguf import kinds
from mlxlora.export.gguf.families import Family, Tensor, family_of
from mlxlora.export.gguf.keys import Shape, shape_of
from mlxlora.lora.layers import weight_shape
from mlxlora.quantized import QUANTIZED


@dataclass(frozen=True)
class Slot:
    """A tensor's place in the file."""

    tensor: Tensor
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # from where the tensors begin, bytes


class Layout:
    """Where everything is in the file, before any weight is read."""

    def __init__(self, model: nn.Module, config: dict[str, Any], quant: kinds.Quant) -> None:
        """Raises ExportError for a family that is not written, or a tensor without a place."""
        self.family_name, self.family = family_of(config)
        self.writer = GGUFWriter(None, self.family.arch_name)
        shape = shape_of(model, config)
        self.extra = self.family.describe(self.writer, shape)
        self.slots: dict[str, Slot] = {}  # by mlx-lm's name
        self.notes: list[str] = []
        self._size = 0
        self.writer.add_file_type(quant.file)
        self.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, array in self.extra.items():
            self._add(name, Tensor(name), array.shape, GGMLQuantizationType.F32)
        tensors = file_tensors(model, self.family, shape)
        tied = not any(tensor.name == "output.weight" for tensor, _ in tensors.values())
        for name, (tensor, size) in tensors.items():
            size = tensor.shape(size)
            self._add(name, tensor, size, kinds.type_for(tensor.name, size, quant, tied))
        (self.rows,) = (
            size[0] for tensor, size in tensors.values() if tensor.name == "token_embd.weight"
        )
        self._note(quant)

    def _add(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], kind: GGMLQuantizationType
    ) -> None:
        count = kinds.size(shape, kind)
        self.slots[name] = Slot(tensor, shape, kind, self._size)
        self.writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), count, raw_dtype=kind)
        self._size += GGUFWriter.ggml_pad(count, self.writer.data_alignment)

    def _note(self, quant: kinds.Quant) -> None:
        odd = [
            slot.tensor.name
            for slot in self.slots.values()
            if slot.kind == GGMLQuantizationType.F16 and quant.type != slot.kind
        ]
        if odd:
            self.notes.append(
                f"{len(odd)} tensors are float16, as their rows are no multiple of 32 wide: "
                + ", ".join(odd[:3])
                + (", ..." if len(odd) > 3 else "")
            )

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return self._size

    def write(self, file: BinaryIO, tensors: Iterator[tuple[str, mx.array]]) -> int:
        """Write the file; returns its bytes. tensors: the model's, in any order, by its names."""
        self.writer.fout, self.writer.state = [cast(Any, file)], WriterState.EMPTY  # no name
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        start = GGUFWriter.ggml_pad(file.tell(), self.writer.data_alignment)
        file.truncate(start + self._size)
        missing = set(self.slots)
        for name, array in self._all(tensors):
            slot = self.slots[name]
            missing.remove(name)
            array = slot.tensor.stored(array)
            mx.eval(array)
            file.seek(start + slot.offset)
            for piece in kinds.chunks(array, slot.kind, slot.tensor.name):
                file.write(piece)
            del array
            mx.clear_cache()
        assert not missing, missing
        return start + self._size

    def _all(self, tensors: Iterator[tuple[str, mx.array]]) -> Iterator[tuple[str, mx.array]]:
        yield from ((name, mx.array(array)) for name, array in self.extra.items())
        yield from tensors


def file_tensors(
    model: nn.Module, family: Family, shape: Shape
) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Of every weight, by its name in the model: its place in the file, its shape unpacked.

    Raises ExportError naming those that llama.cpp has no place for.
    """
    names = gguf.get_tensor_name_map(family.arch, shape.blocks)
    modules = dict(model.named_modules())
    found: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    homeless = []
    for name, array in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        module, size = modules.get(path), tuple(array.shape)
        if isinstance(module, QUANTIZED) and leaf != "bias":
            if leaf != "weight":
                continue
            size = weight_shape(module)
        tensor = family.tensor(name, shape, names)
        if tensor is None:
            homeless.append(name)
        else:
            found[name] = tensor, size
    if homeless:
        raise ExportError(
            "llama.cpp has no place for these tensors of the model: "
            + ", ".join(homeless[:6])
            + (f" and {len(homeless) - 6} more" if len(homeless) > 6 else "")
            + "; export with --format hf instead"
        )
    return found
