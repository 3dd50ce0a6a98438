"""Base + adapter as one model directory for mlx-lm: touched layers merged and rounded again.

Over a quantized base the touched layers must be rounded again, and rounding to few bits can
erase what was trained: it moves weights by more than the delta does. So by default their bits are
chosen, and they are rounded, by what that does to their answers (auto.py), and what is written is
measured against base + adapter before it takes its place (proof.py).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxlora.base import Base, open_tokenizer
from mlxlora.errors import ConfigError, ExportError
from mlxlora.export.auto import MAX_SIZE, Progress, Way, choose, extra_bytes, write
from mlxlora.export.card import card
from mlxlora.export.fidelity import Fidelity
from mlxlora.export.merged import Layer, Merged
from mlxlora.export.proof import FILE, PROOF, Proof, save, written
from mlxlora.export.shards import Add, write_model
from mlxlora.export.trial import trial
from mlxlora.files import refuse_existing
from mlxlora.lora.adapter import CARD, Adapter
from mlxlora.quantized import QUANTIZED

Bits = Literal["auto", "keep", "none"] | int
WORDS: tuple[Literal["auto", "keep", "none"], ...] = ("auto", "keep", "none")
WEIGHT_BITS = (4, 5, 6, 8)
REMEDY = "--bits 8 keeps more, so does --bits auto with a larger --max-size; --bits none everything"


@dataclass
class Fused:
    """What fuse() wrote."""

    path: str
    bytes: int = 0
    times: float = 1.0  # the base's weights on disk
    layers: int = 0
    bits: str = ""  # of the touched layers
    fidelity: Fidelity | None = None


def fuse(
    model: str | Path | Base,
    adapter: Adapter,
    out: str | Path,
    bits: Bits = "auto",
    *,
    max_size: float | None = None,
    progress: Progress = lambda what, done, of: None,
    proof: Proof | None = PROOF,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Fused:
    """Write base + adapter as a model directory that mlx-lm and mlxlora load.

    bits, for a quantized base: "auto" finds the best ones of each touched layer with which the
    weights take at most max_size (MAX_SIZE) times the base's bytes, "keep" rounds touched layers
    like the base, a number rounds them to so many bits, "none" writes the whole model unquantized.
    For an unquantized base only "auto", "keep" and "none", which are the same. proof: what it is
    measured by (None: not at all). Peak memory is one shard and one layer; with "auto" or a proof
    one shard, one block, and its work on a few thousand tokens. Raises AdapterError; ExportError,
    also for a model that is not what was trained.
    """
    refuse_existing(Path(out))
    merged = Merged.of(model, adapter, force=force, trust_remote_code=trust_remote_code)
    plan = _Plan(merged, _resolve(bits, merged.quantization))
    if max_size is not None and plan.bits != "auto":
        raise ExportError("--max-size is for --bits auto over a quantized base")

    def again() -> Merged:
        return Merged(merged.source, adapter, trust_remote_code=trust_remote_code)

    if plan.bits == "auto":
        tokenizer = open_tokenizer(merged.source, merged.config, trust_remote_code)
        rows = trial(tokenizer, adapter, part="train")
        plan.ways = choose(again(), rows, max_size or MAX_SIZE, progress, trust_remote_code)
    result = Fused(path=str(out), layers=len(merged.layers), bits=plan.describe())

    def fill(add: Add) -> None:
        if plan.ways:
            write(again(), rows, plan.ways, add, progress, trust_remote_code)
        for name, array in plan.tensors():
            add(name, array)

    def finish(directory: Path) -> None:
        if proof is not None:
            opened = partial(written, directory, trust_remote_code)
            result.fidelity = proof.of(again(), opened, REMEDY)
            save(result.fidelity, directory / FILE)
        text = card(adapter, f"fused, {result.bits}", "mlx", result.fidelity)
        (directory / CARD).write_text(text, "utf-8")

    result.bytes = write_model(
        Path(out),
        fill,
        plan.config(),
        merged.source,
        plan.expected_bytes(),
        finish=finish,
    )
    size = sum(file.stat().st_size for file in Path(out).glob("model*.safetensors"))
    result.times = size / merged.bytes
    return result


def wished(text: str, option: str) -> Bits:
    """What the option of a command line says. Raises ConfigError for no bits at all."""
    for known in (*WORDS, *WEIGHT_BITS):
        if text == str(known):
            return known
    names = ", ".join(map(str, (*WORDS, *WEIGHT_BITS)))
    raise ConfigError(f"{option} {text!r} is not known; known are {names}")


def _resolve(bits: Bits, quantization: dict[str, Any] | None) -> Bits:
    """The bits to write. Raises ExportError for an impossible wish."""
    if isinstance(bits, int) and bits not in WEIGHT_BITS:
        raise ExportError(f"--bits {bits}: known are auto, keep, none, {WEIGHT_BITS}")
    if quantization is None:
        if isinstance(bits, int):
            raise ExportError(
                f"--bits {bits} is for a quantized base; this one is not. Fuse without it, "
                f"then: mlxlora quantize --model FUSED --out DIR --bits {bits}"
            )
        return "keep"
    return bits


class _Plan:
    """How the layers of a merged model are rounded."""

    def __init__(self, merged: Merged, bits: Bits) -> None:
        self.merged, self.bits = merged, bits
        self.ways: dict[str, Way] = {}  # of those quantized layers that are rounded elsewhere

    def describe(self) -> str:
        """Of the touched layers."""
        if self.merged.quantization is None or self.bits == "none":
            return "unquantized"
        if self.bits == "auto":
            counts = Counter(way.bits or 16 for way in self.ways.values())
            those = [f"{count} with {bits}" for bits, count in sorted(counts.items())]
            return f"bits chosen by layer ({', '.join(those) or 'none to choose'})"
        return f"{self.merged.quantization['bits'] if self.bits == 'keep' else self.bits} bits"

    def config(self) -> dict[str, Any]:
        """config.json of the fused model: per-layer bits where they differ from the base's."""
        config, quantization = dict(self.merged.config), self.merged.quantization
        if quantization is None or self.bits == "none":
            config.pop("quantization", None)
            config.pop("quantization_config", None)
        elif self.bits != "keep":
            modules = ((path, self.merged.modules[path]) for path in self.merged.touched)
            touched = {p: self._settings(p, m) for p, m in modules if isinstance(m, QUANTIZED)}
            config["quantization"] = {**quantization, **touched}
            config["quantization_config"] = config["quantization"]
        return config

    def _settings(self, path: str, module: nn.Module) -> dict[str, Any] | bool:
        """Quantization of a touched layer: as chosen, the base's own, or affine at the bits."""
        if path in self.ways:
            return self.ways[path].settings()
        own = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        if not isinstance(self.bits, int) or self.bits == module.bits:
            return own
        group = module.group_size if module.mode == "affine" else 32
        return {"group_size": group, "bits": self.bits, "mode": "affine"}

    def expected_bytes(self) -> int:
        """About how many bytes will be written."""
        if self.merged.quantization is None or self.bits == "keep":
            return self.merged.bytes
        if self.bits == "auto":
            return self.merged.bytes + extra_bytes(self.merged, self.ways)
        target = 16 if self.bits == "none" else int(self.bits)
        return int(self.merged.bytes * target / self.merged.quantization["bits"])

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Every tensor to write, in the model's order; nothing is kept once handed out."""
        for piece in self.merged.walk(unpack=self.bits == "none"):
            if not isinstance(piece, Layer):
                yield piece
                continue
            parts = self._rounded(piece) | piece.rest
            path = piece.path
            del piece
            for leaf in list(parts):
                yield f"{path}.{leaf}", parts.pop(leaf)

    def _rounded(self, layer: Layer) -> dict[str, mx.array]:
        """The tensors to write; none of those that are rounded elsewhere."""
        if layer.path in self.ways:
            return {}
        weight = layer.weight.astype(layer.dtype)
        if not isinstance(layer.module, QUANTIZED) or self.bits == "none":
            return {"weight": weight}
        settings = self._settings(layer.path, layer.module)
        assert isinstance(settings, dict)
        names = ("weight", "scales", "biases")  # biases only in affine mode
        return dict(zip(names, mx.quantize(weight, **settings), strict=False))
