"""A quantized base from an unquantized one, layer by layer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.base import open_model
from mlxlora.errors import ExportError
from mlxlora.export.shards import taken_tensors, write_model
from mlxlora.model_files import check_directory, find

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def quantize(
    model: str | Path,
    out: str | Path,
    bits: int = 4,
    group_size: int = 64,
    *,
    trust_remote_code: bool = False,
) -> int:
    """Write a quantized copy of a model directory; return its size in bytes.

    Affine quantization in groups along the input dimension, as mlx_lm.convert does, with
    the exceptions that the architecture itself asks for. Layers whose input is not a
    multiple of group_size stay as they are. Raises ExportError for impossible bits or a
    base that is quantized already.
    """
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ExportError(f"MLX quantizes to {BITS} bits in groups of {GROUP_SIZES}")
    source, _ = find(model)
    check_directory(source)
    module, config = open_model(source, trust_remote_code=trust_remote_code)
    if "quantization" in config:
        raise ExportError(f"{source} is quantized already")
    config["quantization"] = _quantize_layers(module, bits, group_size)
    config["quantization_config"] = config["quantization"]
    tensors = taken_tensors(module)
    size = sum(array.nbytes for array in tensors.values())
    return write_model(Path(out), _drained(tensors), config, source, size)


def _quantize_layers(model: nn.Module, bits: int, group_size: int) -> dict[str, Any]:
    """Quantize (lazily) and return the config's quantization table."""
    table: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    special = getattr(model, "quant_predicate", None)

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        choice = special(path, module) if special is not None else True
        if isinstance(choice, dict):
            table[path] = choice
        return choice  # type: ignore[no-any-return]

    nn.quantize(model, group_size, bits, class_predicate=choose)
    return table


def _drained(tensors: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """Hand out tensors one by one, keeping none."""
    for name in list(tensors):
        yield name, tensors.pop(name)
