"""An adapter as Hugging Face PEFT has it: adapter_config.json and adapter_model.safetensors.

Written so that every reader of the format takes it: one rank and one scale, since vLLM reads no
patterns; lora_alpha a whole number where rank x scale is one, else the rank, with the scale in B,
since Ollama reads nothing else; short module names as targets where they mean exactly these
modules; experts one by one, which vLLM and llama.cpp's converter stack and PEFT, from 0.19 on,
fuses for transformers 5. Read in peft/tuners/tuners_utils.py and utils/
transformers_weight_conversion.py (0.21), vllm/lora/peft_helper.py and lora_model.py, and
llama.cpp's convert_lora_to_gguf.py.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora.base import Base
from mlxlora.errors import ExportError
from mlxlora.files import atomic_directory, save_tensors, write_json
from mlxlora.lora.adapter import PROVENANCE, Adapter
from mlxlora.lora.fit import check_fit
from mlxlora.lora.layers import EXPERTS, LoRAEmbedding, layer_for, weight_shape
from mlxlora.lora.names import DOWN, GATE, HEADS, UP, Names

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PREFIX = "base_model.model."
HEAD = "lm_head"
TRANSPOSED = {"gpt2"}  # families whose linear layers transformers stores the other way around


@dataclass
class Exported:
    """What write() wrote."""

    path: str
    modules: int
    rank: int
    alpha: int
    notes: list[str] = field(default_factory=list)  # which readers of the format want less


def write(
    adapter: Adapter, base: Base, out: str | Path, *, beside: str | Path | None = None
) -> Exported:
    """Write the directory, whole or not at all.

    beside: the adapter's own directory, whose provenance and model card are put beside. Raises
    AdapterError for one that does not fit base, ExportError for what the format has no place for.
    """
    if adapter.method == "full":
        raise ExportError(
            "an adapter of every weight is no LoRA; fuse it: mlxlora fuse --model M --adapter A "
            "--out DIR"
        )
    plan = _Plan(adapter, base)
    config = plan.config()
    with atomic_directory(Path(out)) as temporary:
        save_tensors(temporary / WEIGHTS, plan.tensors, {"format": "pt"})
        write_json(temporary / CONFIG, config)
        if adapter.provenance:
            write_json(temporary / PROVENANCE, dict(adapter.provenance))
        if beside is not None and (Path(beside) / CARD).is_file():
            shutil.copyfile(Path(beside) / CARD, temporary / CARD)
    return Exported(str(out), len(adapter.modules), config["r"], config["lora_alpha"], plan.notes)


class _Plan:
    """Which tensors are written under which names."""

    def __init__(self, adapter: Adapter, base: Base) -> None:
        self.adapter, self.base = adapter, base
        self.names = Names(base.model, base.config)
        self.family = str(base.config.get("model_type"))
        self.rank = max(adapter.rank, 1)
        alpha = round(adapter.scale * self.rank)
        exact = alpha > 0 and alpha / self.rank == adapter.scale
        self.alpha, self.factor = (alpha, 1.0) if exact else (self.rank, adapter.scale)
        self.tensors: dict[str, mx.array] = {}
        self.adapted: set[str] = set()  # names in transformers
        self.saved: set[str] = set()  # of modules saved whole
        self.notes: list[str] = []
        check_fit(self.names.modules, adapter)
        for path in adapter.modules:
            self._module(path)
        self._fill_experts()
        self._whole()
        self._note()

    def _module(self, path: str) -> None:
        module, own = self.names.modules[path], self.adapter.tensors(path)
        kind = layer_for(module)
        assert kind is not None
        left, right = kind.sides(own["lora_a"], own["lora_b"])
        left = left.astype(mx.float32) * self.factor
        right, m = right.astype(mx.float32), own.get("m")
        there = self.names.there(path)
        if not there:
            raise ExportError(
                f"{path}: in models of type {self.family}, what transformers has there is not "
                "known, or not the same; fuse the adapter instead"
            )
        if isinstance(module, EXPERTS):
            self._experts(path, there, left, right, m)
        elif kind is LoRAEmbedding:
            self._embedding(path, there[0], left, right, m)
        else:
            self._add(there[0], lora_A=right, lora_B=left, m=m)

    def _add(self, name: str, *, m: mx.array | None = None, **factors: mx.array) -> None:
        for kind, array in factors.items():
            self.tensors[f"{PREFIX}{name}.{kind}.weight"] = mx.contiguous(array)
        if m is not None:
            self.tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = m.astype(mx.float32)
        self.adapted.add(name)

    def _experts(
        self, path: str, there: list[str], left: mx.array, right: mx.array, m: mx.array | None
    ) -> None:
        if m is not None:
            raise ExportError(f"{path}: PEFT has no DoRA over experts; fuse the adapter instead")
        for number, name in enumerate(there):
            self._add(name, lora_A=right[number], lora_B=left[number])

    def _embedding(
        self, path: str, name: str, left: mx.array, right: mx.array, m: mx.array | None
    ) -> None:
        if m is not None:
            raise ExportError(
                f"{path}: DoRA over an embedding has one magnitude for each token here, and in "
                "PEFT one for each dimension; fuse the adapter instead"
            )
        self.tensors[f"{PREFIX}{name}.lora_embedding_A"] = mx.contiguous(left.T)
        self.tensors[f"{PREFIX}{name}.lora_embedding_B"] = mx.contiguous(right.T)
        self.adapted.add(name)
        if self.names.tied:  # here the head changes with it
            self._add(HEAD, lora_A=right, lora_B=left)
            self.notes.append("llama.cpp takes no factors of a head that is the embedding")

    def _fill_experts(self) -> None:
        """Where gate_proj or up_proj is adapted, the block's other projections get zeros.

        In transformers 5 the two are one parameter, which PEFT finds beneath down_proj's.
        """
        experts = {
            path for path, module in self.names.modules.items() if isinstance(module, EXPERTS)
        }
        for path in experts & set(self.adapter.modules):
            around, _, leaf = path.rpartition(".")
            if leaf not in (GATE, UP):
                continue
            for other in {f"{around}.{one}" for one in (GATE, UP, DOWN)} & experts:
                if other not in self.adapter.modules:
                    count, out, inside = weight_shape(self.names.modules[other])
                    left = mx.zeros((count, out, self.rank))
                    right = mx.zeros((count, self.rank, inside))
                    self._experts(other, self.names.there(other), left, right, None)

    def _whole(self) -> None:
        outer = (self.names.embedding, *(p for p in self.names.modules if _leaf(p) in HEADS))
        weights: dict[str, mx.array] = {}
        for name, array in self.adapter.whole.items():
            path, _, leaf = name.rpartition(".")
            there = self.names.there(path) if path in outer else []
            if not there:
                raise ExportError(
                    f"{name}: only the embedding and the head can be written whole for PEFT; "
                    "fuse the adapter instead"
                )
            weights[f"{there[0]}.{leaf}"] = array.astype(mx.float32)
            if path == self.names.embedding and self.names.tied:
                weights[f"{HEAD}.{leaf}"] = array.astype(mx.float32)
        self.saved = {name.rpartition(".")[0] for name in weights}
        self.tensors |= {PREFIX + name: array for name, array in weights.items()}
        if weights:
            self.notes.append("vLLM and llama.cpp take no weights that were trained whole")

    def _note(self) -> None:
        if self.adapter.method == "dora":
            self.notes.append("vLLM and llama.cpp take no DoRA; fused, they take it")
        experts = {p for p, m in self.names.modules.items() if isinstance(m, EXPERTS)}
        chosen = experts & set(self.adapter.modules)
        plain = {p for p in self.adapter.modules if _leaf(p) in (GATE, UP, DOWN)} - experts
        if experts and plain:
            self.notes.append(
                f"under transformers 5, PEFT takes {', '.join(sorted(map(_leaf, plain)))} for "
                "experts alone and leaves the factors of the other layers of that name out"
            )
        if chosen and chosen != {p for p in experts if _leaf(p) in set(map(_leaf, chosen))}:
            self.notes.append(
                "PEFT will say that factors of the other blocks' experts are missing; they are 0"
            )

    def config(self) -> dict[str, Any]:
        """adapter_config.json."""
        universe = {name for path in self.names.modules for name in self.names.there(path)}
        if self.names.tied:
            universe.add(HEAD)
        experts = any(".experts." in name for name in self.adapted)
        return {
            "base_model_name_or_path": _base_name(self.adapter.provenance, self.base),
            "bias": "none",
            "fan_in_fan_out": self.family in TRANSPOSED,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.alpha,
            # PEFT refuses dropout over the parameters that experts are in transformers 5
            "lora_dropout": 0.0 if experts else self.adapter.dropout,
            "modules_to_save": _short(self.saved, universe) if self.saved else None,
            "peft_type": "LORA",
            "r": self.rank,
            **_targets(self.adapted, universe, wrapped=self._wrapped()),
            "task_type": "CAUSAL_LM",
            "use_dora": self.adapter.method == "dora",
            "use_rslora": False,
        }

    def _wrapped(self) -> bool:
        """Whether transformers has modules beside these (of images, of sound) by like names."""
        return any(path.startswith("language_model.") for path in self.names.modules)


def _targets(adapted: set[str], universe: set[str], *, wrapped: bool) -> dict[str, Any]:
    """The fields that choose exactly the adapted ones among the modules there are."""
    leaves = {_leaf(name) for name in adapted}
    alike = {name for name in universe if _leaf(name) in leaves}
    blocks = {block for name in adapted if (block := _block(name)) is not None}
    if not wrapped and alike == adapted:
        return {"target_modules": sorted(leaves)}
    inside = all(_block(name) is not None for name in adapted)
    if not wrapped and inside and {name for name in alike if _block(name) in blocks} == adapted:
        return {"target_modules": sorted(leaves), "layers_to_transform": sorted(blocks)}
    return {"target_modules": sorted(adapted)}


def _short(names: set[str], universe: set[str]) -> list[str]:
    """Each by its last part where that means no other."""
    ends = [_leaf(name) for name in universe]
    return sorted(_leaf(n) if ends.count(_leaf(n)) <= 1 else n for n in names)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _block(name: str) -> int | None:
    """The number of the block that PEFT sees in a name: the first one."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def _base_name(provenance: Mapping[str, Any], base: Base) -> str:
    """What the adapter was made for: by PEFT's own word, by ours, or the base at hand."""
    imported = (provenance.get("imported") or {}).get("base")
    return str(imported or (provenance.get("base") or {}).get("name") or base.identity.name)
