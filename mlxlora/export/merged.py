"""Base + adapter from disk, module by module, in full precision: what every format is made of.

weight + scale * A B (Hu et al. 2021, section 4.1) is summed in float32. Weights are read when
they are asked for and let go when they are handed out, so a walk takes no more memory than its
largest layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.base import Base, open_model
from mlxlora.errors import AdapterError
from mlxlora.export.shards import taken_tensors
from mlxlora.lora.adapter import Adapter, differences
from mlxlora.lora.fit import check_fit
from mlxlora.lora.layers import EMBEDDING, LowRank, layer_for
from mlxlora.lora.whole import fitted
from mlxlora.model_files import check_directory, find, identify
from mlxlora.quantized import QUANTIZED, widen


@dataclass
class Layer:
    """A module that the adapter changes, or that is packed and asked for unpacked."""

    path: str
    module: nn.Module  # the base's; holds its own tensors until the walk goes on
    before: mx.array  # its weight, float32
    weight: mx.array  # with what was trained, float32
    rest: dict[str, mx.array]  # what else is to be written: its bias
    dtype: mx.Dtype  # that the base computes it in
    touched: bool  # by the adapter


class Merged:
    """A base in a directory, and what an adapter makes of it. Nothing is computed before a walk."""

    def __init__(
        self, source: Path, adapter: Adapter | None = None, *, trust_remote_code: bool = False
    ) -> None:
        """Raises AdapterError if the adapter does not fit."""
        self.source, self.adapter = source, adapter
        self.model, self.config = open_model(source, trust_remote_code=trust_remote_code)
        self.modules = dict(self.model.named_modules())
        self.layers: dict[str, type[LowRank]] = {}
        if adapter is not None:
            check_fit(self.modules, adapter)
            kinds = ((path, layer_for(self.modules[path])) for path in adapter.modules)
            self.layers = {path: kind for path, kind in kinds if kind is not None}  # all: they fit
        whole = fitted(self.model, adapter.whole if adapter else {})
        self.whole = whole.weights  # in place of the model's own
        self.replaced = whole.modules  # in place of quantized ones

    @classmethod
    def of(
        cls,
        model: str | Path | Base,
        adapter: Adapter | None = None,
        *,
        force: bool = False,
        trust_remote_code: bool = False,
    ) -> "Merged":
        """Of a base by its name. Raises AdapterError for an adapter of another, unless forced."""
        source, commit = (model.path, "") if isinstance(model, Base) else find(model)
        check_directory(source)
        if adapter is not None and not force:
            name = "" if isinstance(model, Base) else str(model)
            _check_base(source, name, commit, adapter)
        return cls(source, adapter, trust_remote_code=trust_remote_code)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The base's, as its config tells it; None if its weights are not packed."""
        return self.config.get("quantization")

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has an embedding of."""
        found = (m for m in self.modules.values() if isinstance(m, EMBEDDING))
        return max(int(module.weight.shape[0]) for module in found)

    @property
    def touched(self) -> list[str]:
        """Paths of the modules whose weight is computed anew."""
        return [*self.layers, *self.replaced]

    @property
    def bytes(self) -> int:
        """Of the base's weights on disk."""
        return sum(file.stat().st_size for file in self.source.glob("model*.safetensors"))

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Every weight by mlx-lm's name, merged and unpacked, in the type the base computes in."""
        for piece in self.walk(unpack=True):
            if isinstance(piece, Layer):
                yield f"{piece.path}.weight", piece.weight.astype(piece.dtype)
                yield from ((f"{piece.path}.{leaf}", array) for leaf, array in piece.rest.items())
            else:
                yield piece

    def walk(self, unpack: bool = False) -> Iterator[tuple[str, mx.array] | Layer]:
        """Every tensor that is copied, by name, and every layer that is not; in the model's order.

        unpack: every packed layer too. Only once: the model is empty afterwards.
        """
        names = taken_tensors(self.model)
        pending: dict[str, dict[str, mx.array]] = {}
        for name in list(names):
            path, _, leaf = name.rpartition(".")
            array = names.pop(name)
            if not self._made(path, unpack):
                yield name, self.whole.get(name, array)
                continue
            pending.setdefault(path, {})[leaf] = array
            del array
            if not any(other.rpartition(".")[0] == path for other in names):
                yield self._merge(path, pending.pop(path))
                self._forget(path)

    def _made(self, path: str, unpack: bool) -> bool:
        packed = unpack and isinstance(self.modules.get(path), QUANTIZED)
        return packed or path in self.layers or path in self.replaced

    def _merge(self, path: str, parts: dict[str, mx.array]) -> Layer:
        module = self.modules[path]
        for leaf, array in parts.items():
            module[leaf] = array
        dtype = parts["scales"].dtype if "scales" in parts else parts["weight"].dtype
        if dtype == mx.uint8:  # the scales of mxfp4 and its kin
            dtype = mx.bfloat16
        weight = before = widen(module)
        if self.adapter is not None and path in self.layers:
            own = self.adapter.tensors(path)
            weight = self.layers[path].merged(weight, own, self.adapter.scale)
        elif path in self.replaced:
            weight = self.replaced[path].weight.astype(mx.float32)
        rest = {}
        if "bias" in parts:
            rest["bias"] = self.whole.get(f"{path}.bias", parts["bias"])
            if path in self.replaced:
                rest["bias"] = self.replaced[path].bias
        touched = path in self.layers or path in self.replaced
        return Layer(path, module, before, weight, rest, dtype, touched)

    def _forget(self, path: str) -> None:
        module = self.modules[path]
        for leaf, value in list(module.items()):
            if isinstance(value, mx.array):
                module[leaf] = mx.array(0)


def _check_base(source: Path, name: str, commit: str, adapter: Adapter) -> None:
    found = differences(adapter.provenance, identify(name, source, commit).to_dict())
    if found:
        raise AdapterError(
            "the adapter was trained on another base:\n"
            + "\n".join(f"  {line}" for line in found)
            + f"\nIt was trained on {adapter.provenance['base'].get('name')}; "
            "write it with that base, or pass --force."
        )
