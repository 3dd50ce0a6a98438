"""Base + adapter as one model: deltas added to the weights, layer by layer, from disk.

weight + scale * A B (Hu et al. 2021, section 4.1) is summed in float32 and written in the
base's dtype. Over a quantized base the touched layers must be rounded again, and rounding
to few bits can erase what was trained: it moves weights by more than the delta does. So
the default keeps touched layers at TOUCHED_BITS, and the rounding error is measured
against the delta and reported.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from mlxlora.base import Base, open_model
from mlxlora.errors import AdapterError, ExportError
from mlxlora.export.shards import taken_tensors, write_model
from mlxlora.files import refuse_existing
from mlxlora.lora.adapter import Adapter, differences
from mlxlora.lora.layers import LowRank, layer_for
from mlxlora.lora.whole import fitted
from mlxlora.model_files import check_directory, find, identify
from mlxlora.quantized import QUANTIZED, widen

Bits = Literal["default", "keep", "none"] | int
TOUCHED_BITS = 8  # of touched layers, by default, over a base with fewer
WEIGHT_BITS = (4, 5, 6, 8)


@dataclass
class Fused:
    """What fuse() wrote."""

    path: str
    bytes: int = 0
    layers: int = 0
    bits: str = ""  # of the touched layers
    # Largest over layers of ||written - (W + delta)|| / ||delta||: 1 means that rounding
    # moved the weights as far as training did.
    worst_error: float = 0.0
    mean_error: float = 0.0
    errors: list[float] = field(default_factory=list, repr=False)


def fuse(
    model: str | Path | Base,
    adapter: Adapter,
    out: str | Path,
    bits: Bits = "default",
    *,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Fused:
    """Write base + adapter as a model directory that mlx-lm and mlxlora load.

    bits, for a quantized base: "keep" rounds touched layers like the base, a number rounds
    them to so many bits, "none" writes the whole model unquantized, "default" is
    TOUCHED_BITS. For an unquantized base only "keep" and "none", which are the same, or
    "default". Peak memory is one shard and one layer. Raises ExportError, AdapterError.
    """
    refuse_existing(Path(out))
    source, commit = (model.path, "") if isinstance(model, Base) else find(model)
    check_directory(source)
    if not force:
        _check_base(source, str(model) if not isinstance(model, Base) else "", commit, adapter)
    module, config = open_model(source, trust_remote_code=trust_remote_code)
    quantization = config.get("quantization")
    bits = _resolve(bits, quantization)
    plan = _Plan(module, adapter, bits, quantization)
    config = plan.config(config)
    result = Fused(path=str(out), layers=len(plan.layers), bits=plan.bits_text)
    expected = plan.expected_bytes(sum(f.stat().st_size for f in source.glob("model*.safetensors")))
    tensors = plan.tensors(result)
    result.bytes = write_model(Path(out), tensors, config, source, expected)
    if result.errors:
        result.worst_error = max(result.errors)
        result.mean_error = sum(result.errors) / len(result.errors)
    return result


def _check_base(source: Path, name: str, commit: str, adapter: Adapter) -> None:
    found = differences(adapter.provenance, identify(name, source, commit).to_dict())
    if found:
        raise AdapterError(
            "the adapter was trained on another base:\n"
            + "\n".join(f"  {line}" for line in found)
            + f"\nIt was trained on {adapter.provenance['base'].get('name')}; "
            "fuse into that base, or pass --force."
        )


def _resolve(bits: Bits, quantization: dict[str, Any] | None) -> Bits:
    """The bits to write, "default" resolved. Raises ExportError for an impossible wish."""
    if isinstance(bits, int) and bits not in WEIGHT_BITS:
        raise ExportError(f"--bits {bits}: known are keep, none, {WEIGHT_BITS}")
    if quantization is None:
        if isinstance(bits, int):
            raise ExportError(
                f"--bits {bits} is for a quantized base; this one is not. Fuse without it, "
                f"then: mlxlora quantize --model FUSED --out DIR --bits {bits}"
            )
        return "keep"
    if bits == "default":
        return TOUCHED_BITS if quantization["bits"] < TOUCHED_BITS else "keep"
    return bits


class _Plan:
    """Which tensors of a lazily opened model are written how."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, bits: Bits, quantization: dict[str, Any] | None
    ) -> None:
        self.model, self.adapter, self.bits = model, adapter, bits
        self.quantization = quantization
        self.modules = dict(model.named_modules())
        self.layers = {path: self._layer(path) for path in adapter.modules}
        whole = fitted(model, adapter.whole)
        self.whole = whole.weights  # in place of the model's own
        self.replaced = whole.modules  # in place of quantized ones
        self.bits_text = self._describe()

    def _layer(self, path: str) -> type[LowRank]:
        module = self.modules.get(path)
        kind = layer_for(module)
        if module is None or kind is None:
            raise AdapterError(f"adapter does not fit this base: it has no layer {path}")
        wanted = kind.shapes(module, self.adapter.rank)
        for name, array in self.adapter.tensors(path).items():
            if tuple(array.shape) != wanted[name]:
                raise AdapterError(
                    f"adapter does not fit this base: {path}.{name} is {tuple(array.shape)}, "
                    f"the base wants {wanted[name]}"
                )
        return kind

    @property
    def touched(self) -> list[str]:
        """Paths of the modules whose weight is computed anew."""
        return [*self.layers, *self.replaced]

    def _describe(self) -> str:
        if self.quantization is None or self.bits == "none":
            return "unquantized"
        return f"{self.quantization['bits'] if self.bits == 'keep' else self.bits} bits"

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json of the fused model: per-layer bits where they differ from the base's."""
        config = dict(config)
        if self.quantization is None or self.bits == "none":
            config.pop("quantization", None)
            config.pop("quantization_config", None)
        elif isinstance(self.bits, int):
            packed = (p for p in self.touched if isinstance(self.modules[p], QUANTIZED))
            touched = {path: self._settings(path) for path in packed}
            config["quantization"] = {**self.quantization, **touched}
            config["quantization_config"] = config["quantization"]
        return config

    def _settings(self, path: str) -> dict[str, Any]:
        """Quantization of a touched layer: the base's own, or affine at the wished bits."""
        module = self.modules[path]
        own = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        if not isinstance(self.bits, int) or self.bits == module.bits:
            return own
        group = module.group_size if module.mode == "affine" else 32
        return {"group_size": group, "bits": self.bits, "mode": "affine"}

    def expected_bytes(self, base_bytes: int) -> int:
        """About how many bytes will be written."""
        if self.quantization is None:
            return base_bytes
        if self.bits == "keep":
            return base_bytes
        target = 16 if self.bits == "none" else int(self.bits)
        return int(base_bytes * target / self.quantization["bits"])

    def tensors(self, result: Fused) -> Iterator[tuple[str, mx.array]]:
        """Every tensor to write, in the model's order; nothing is kept once handed out."""
        names = taken_tensors(self.model)
        replaced = {path for path, module in self.modules.items() if self._rewritten(path, module)}
        pending: dict[str, dict[str, mx.array]] = {}
        for name in list(names):
            path, _, leaf = name.rpartition(".")
            array = names.pop(name)
            if path not in replaced:
                yield name, self.whole.get(name, array)
                continue
            pending.setdefault(path, {})[leaf] = array
            if not any(other.rpartition(".")[0] == path for other in names):
                yield from self._rewrite(path, pending.pop(path), result)

    def _rewritten(self, path: str, module: nn.Module) -> bool:
        return path in self.touched or (self.bits == "none" and isinstance(module, QUANTIZED))

    def _rewrite(
        self, path: str, parts: dict[str, mx.array], result: Fused
    ) -> Iterator[tuple[str, mx.array]]:
        """The tensors of one touched (or only dequantized) layer."""
        module = self.modules[path]
        for leaf, array in parts.items():
            module[leaf] = array
        dtype = parts["scales"].dtype if "scales" in parts else parts["weight"].dtype
        if dtype == mx.uint8:  # the scales of mxfp4 and its kin
            dtype = mx.bfloat16
        weight = before = widen(module)
        if path in self.layers:
            own = self.adapter.tensors(path)
            weight = self.layers[path].merged(weight, own, self.adapter.scale)
        elif path in self.replaced:
            weight = self.replaced[path].weight.astype(mx.float32)
        written, seen = self._rounded(path, module, weight, dtype)
        if "bias" in parts:
            written["bias"] = self.whole.get(f"{path}.bias", parts["bias"])
            if path in self.replaced:
                written["bias"] = self.replaced[path].bias
        if path in self.touched:
            moved = mx.linalg.norm(weight - before)
            error = mx.linalg.norm(seen - weight) / mx.maximum(moved, 1e-30)
            result.errors.append(cast(float, error.item()))
        for leaf in parts:
            module[leaf] = mx.array(0)
        for leaf in list(written):
            yield f"{path}.{leaf}", written.pop(leaf)

    def _rounded(
        self, path: str, module: nn.Module, weight: mx.array, dtype: mx.Dtype
    ) -> tuple[dict[str, mx.array], mx.array]:
        """(the tensors to write, the float32 weight that a reader of them sees)."""
        if not isinstance(module, QUANTIZED) or self.bits == "none":
            cast = weight.astype(dtype)
            return {"weight": cast}, cast.astype(mx.float32)
        settings = self._settings(path)
        names = ("weight", "scales", "biases")  # biases only in affine mode
        parts = dict(zip(names, mx.quantize(weight.astype(dtype), **settings), strict=False))
        seen = mx.dequantize(parts["weight"], parts["scales"], parts.get("biases"), **settings)
        return parts, seen.astype(mx.float32)
