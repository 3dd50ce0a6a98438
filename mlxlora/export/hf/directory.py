"""Base + adapter as a directory that transformers loads, and all that reads what it writes.

Weights are unpacked, or never were packed, and under transformers' names (names.py), in the
type that the base computes in unless another is wished for. Before anything is written, mlx-lm
has to read the very same model from it: an inverse that is wrong writes nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxlora.base import SHELLS, Base
from mlxlora.errors import ExportError
from mlxlora.export.card import card
from mlxlora.export.fidelity import Fidelity
from mlxlora.export.hf.names import INNER, SEEING, Family, family_of
from mlxlora.export.hf.proof import round_trip, shapes
from mlxlora.export.merged import Merged
from mlxlora.export.proof import FILE, PROOF, Proof, save, written
from mlxlora.export.shards import write_model
from mlxlora.files import refuse_existing
from mlxlora.lora.adapter import CARD, Adapter
from mlxlora.model_files import read_config
from mlxlora.quantized import QUANTIZED

DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
REMEDY = "--quant f32 keeps everything"
LARGEST_F16 = 65504.0
HEAD = re.compile(r"(.+\.)?(lm_head|embed_out)\.weight")
# Of config.json: how the weights are packed, which they are not any more.
PACKED = {"quantization", "quantization_config", "compression_config"}
# How many layers predict further tokens: none any more, since mlx-lm does not read them.
AHEAD = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
# Files about packed weights, and about pictures.
NOT_COPIED = {"hf_quant_config.json", "quantize_config.json"}
OF_PICTURES = {
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
}
# What a text_config may leave to the config around it, or to the class that reads it.
SPELT_OUT = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass
class Written:
    """What write() wrote."""

    path: str
    bytes: int = 0  # of the weights
    tensors: int = 0
    dtype: str = ""  # of the weights, in transformers' words
    fidelity: Fidelity | None = None
    notes: list[str] = field(default_factory=list)  # what is not as in the base


def write(
    model: str | Path | Base,
    adapter: Adapter | None,
    out: str | Path,
    quant: str | None = None,
    *,
    proof: Proof | None = PROOF,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Written:
    """Write the directory, whole or not at all.

    quant: one of DTYPES, None for the base's own. proof: what it is measured by. Peak memory is
    one shard and one layer (of experts: one layer's experts). Raises ExportError for a family, a
    type or a number that cannot be written; AdapterError for an adapter that does not fit.
    """
    refuse_existing(Path(out))
    if quant is not None and quant not in DTYPES:
        raise ExportError(
            f"--quant {quant}: --format hf writes {', '.join(DTYPES)}; "
            "packed weights are for --format gguf, or mlxlora quantize"
        )
    merged = Merged.of(model, adapter, force=force, trust_remote_code=trust_remote_code)
    plan = _Plan(merged, quant)
    result = Written(str(out), dtype=NAMES[plan.dtype], notes=plan.notes)

    def finish(directory: Path) -> None:
        if proof is not None:
            again = Merged(merged.source, adapter, trust_remote_code=trust_remote_code)
            opened = partial(written, directory, trust_remote_code)
            result.fidelity = proof.of(again, opened, REMEDY)
            save(result.fidelity, directory / FILE)
        if adapter is not None:
            text = card(adapter, f"merged, {result.dtype}", "transformers", result.fidelity)
            (directory / CARD).write_text(text, "utf-8")

    def counted() -> Iterator[tuple[str, mx.array]]:
        for name, array in plan.tensors():
            result.tensors += 1
            yield name, array

    result.bytes = write_model(
        Path(out),
        counted(),
        plan.config(),
        merged.source,
        plan.expected_bytes(),
        finish,
        kind="pt",
        without=NOT_COPIED | (OF_PICTURES if plan.inside else set()),
    )
    return result


class _Plan:
    """How a merged model is named, typed and described."""

    def __init__(self, merged: Merged, quant: str | None) -> None:
        """Raises ExportError for a model whose inverse is not known, or not right."""
        self.merged = merged
        self.notes: list[str] = []
        self.read = read_config(merged.source)  # as it is on disk: mlx-lm writes into its own
        self.inside = self.read["model_type"] in SEEING  # the model is one part of another
        self.described = self.read.get("text_config") or {} if self.inside else self.read
        self.kind, self.family = self._family()
        shelled = INNER.strip(".") in merged.model
        self.inner = INNER if shelled else ""  # what mlx-lm's names begin with
        self.text: nn.Module = merged.model.language_model if shelled else merged.model
        round_trip(merged.model, self.family, self.inner)
        self.shapes = shapes(self.text)
        self.own = _main_dtype(self.text)
        self.dtype = DTYPES[quant] if quant else self.own
        self._note()

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Every tensor to write, in the model's order; nothing is kept once handed out."""
        for name, array in self.family.there(self._inner()):
            yield name, self._typed(name, array)

    def expected_bytes(self) -> int:
        """How many bytes will be written, but for tensors of another type than most."""
        return sum(map(prod, self.shapes.values())) * self.dtype.size

    def config(self) -> dict[str, Any]:
        """config.json: the base's, without what is no longer so."""
        config = {key: value for key, value in self.described.items() if key not in PACKED}
        if self.inside:
            for key, value in self.read.items():
                if key.endswith("_token_id") or key == "transformers_version":
                    config.setdefault(key, value)
            own = {key: getattr(self.text.args, key, None) for key in SPELT_OUT}
            config |= {key: value for key, value in own.items() if value is not None}
        config["model_type"] = self.kind
        config["architectures"] = [self.family.architecture]
        config["tie_word_embeddings"] = not any(map(HEAD.fullmatch, self.shapes))
        self._name_dtype(config)
        config |= {key: 0 for key in AHEAD if config.get(key)}
        if not any(self.merged.source.glob("*.py")):
            config.pop("auto_map", None)  # it names Python files that are not there
        return config

    def _family(self) -> tuple[str, Family]:
        """(model_type, family) of what is written."""
        kind = self.read["model_type"]
        if self.inside:
            inner = self.described.get("model_type") or SEEING[kind]
            if inner is None or not self.described:
                raise ExportError(
                    f"config.json of this {kind} does not tell its text_config, with a "
                    "model_type, so it cannot be written for transformers"
                )
            kind = inner
        if not type(self.merged.model).__module__.startswith("mlx_lm.models."):
            raise ExportError(
                "a model that brings its own Python cannot be written for transformers; "
                "mlxlora fuse --bits none writes it for mlx-lm"
            )
        return kind, family_of(kind, self.described)

    def _inner(self) -> Iterator[tuple[str, mx.array]]:
        for name, array in self.merged.tensors():
            yield name.removeprefix(self.inner), array
            del array

    def _typed(self, name: str, array: mx.array) -> mx.array:
        """In the type to write. What the base keeps wider than the rest stays as wide."""
        if self.dtype == self.own or not mx.issubdtype(array.dtype, mx.floating):
            return array
        if array.dtype != self.own and array.dtype.size > self.dtype.size:
            return array
        if self.dtype == mx.float16 and mx.any(mx.abs(array) > LARGEST_F16).item():
            raise ExportError(
                f"{name} holds numbers that float16 has none for (above 65504); write bf16 or f32"
            )
        return array.astype(self.dtype)

    def _name_dtype(self, config: dict[str, Any]) -> None:
        """Under the key that is there: transformers 5 says dtype, and reads the older one too."""
        keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
        config |= dict.fromkeys(keys, NAMES[self.dtype])

    def _note(self) -> None:
        if self.inside:
            self.notes.append(
                f"the language model alone, as {self.kind}: mlx-lm does not read the part that sees"
            )
        if self.kind in SHELLS:
            self.notes.append(f"mlxlora loads a {self.kind}, mlx-lm does not")
        if self.merged.quantization is not None:
            self.notes.append("the base's packed weights are unpacked: no finer than they were")
        if any(self.described.get(key) for key in AHEAD):
            self.notes.append("without the layers that predict further tokens: mlx-lm drops them")


def _main_dtype(model: nn.Module) -> mx.Dtype:
    """The type that most of the model's weights are computed in."""
    sizes = dict.fromkeys(NAMES, 0)
    modules = dict(model.named_modules())
    for name, array in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        module, size = modules.get(path), array.size
        dtype = array.dtype
        if isinstance(module, QUANTIZED) and leaf == "weight":
            dtype, size = module.scales.dtype, size * 32 // module.bits
            dtype = mx.bfloat16 if dtype == mx.uint8 else dtype  # mxfp4 and its kin
        if dtype in sizes:
            sizes[dtype] += size
    return max(sizes, key=lambda dtype: sizes[dtype])
