"""Families of models as llama.cpp knows them: their metadata, and what is done to their tensors.

A family is one line in FAMILIES, and only stands there if tests/test_gguf.py has compared its
logits in llama.cpp with MLX's. Names of tensors come from the gguf package; what mlx-lm names
otherwise than transformers is put back first.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import MODEL_ARCH, GGUFWriter

from mlxlora.errors import ExportError
from mlxlora.export.gguf import keys as k
from mlxlora.export.gguf import rope as r
from mlxlora.export.gguf.keys import Extra, Keys, Shape


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model as it is in the file: x[rows][..., columns] + shift."""

    name: str
    rows: np.ndarray | None = None  # a permutation of the first axis
    columns: np.ndarray | None = None  # of the last axis
    shift: float = 0.0
    decay: bool = False  # -exp(x)
    squeezed: bool = False  # without axes of length 1

    def shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """In the file."""
        return tuple(n for n in size if n != 1) if self.squeezed else size

    def stored(self, array: mx.array) -> mx.array:
        """The model's tensor as it is in the file."""
        if self.squeezed:
            array = array.squeeze()
        if self.rows is not None:
            array = array[mx.array(self.rows)]
        if self.columns is not None:
            array = array[..., mx.array(self.columns)]
        if self.decay:
            array = -mx.exp(array.astype(mx.float32))
        return array.astype(mx.float32) + self.shift if self.shift else array

    def restored(self, array: mx.array) -> mx.array:
        """The inverse of stored()."""
        if self.rows is not None:
            array = array[mx.array(np.argsort(self.rows))]
        if self.columns is not None:
            array = array[..., mx.array(np.argsort(self.columns))]
        if self.decay:
            array = mx.log(-array)
        return array - self.shift if self.shift else array


@dataclass(frozen=True)
class Family:
    """How a family is written."""

    arch: MODEL_ARCH
    keys: tuple[Keys, ...]
    interleaved: bool = False  # llama.cpp rotates neighbours, mlx-lm halves: q and k permuted
    plus_one: bool = False  # norms multiply by 1 + weight here, by weight there
    fused: bool = False  # q, k and v stand head by head in one layer; there one after another
    prefixes: tuple[tuple[str, str], ...] = ()  # of names: mlx-lm's, transformers'
    demands: Mapping[str, Any] = field(default_factory=dict)  # the only values llama.cpp knows

    @property
    def arch_name(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.arch]

    def describe(self, writer: GGUFWriter, shape: Shape) -> Extra:
        """Write the metadata; returns the tensors that go with it."""
        for name, value in self.demands.items():
            shape.demand(name, value)
        extra: Extra = {}
        for keys in self.keys:
            extra |= keys(writer, shape) or {}
        return extra

    def tensor(self, name: str, shape: Shape, names: gguf.TensorNameMap) -> Tensor | None:
        """Where a tensor of the model goes; None if llama.cpp has no place for it."""
        there = names.get_name(self._theirs(name), try_suffixes=(".weight", ".bias"))
        if there is None:
            return None
        if there.endswith("attn_sinks"):
            there += ".weight"
        rows = None
        found = re.search(r"\.(q|k)_proj\.(weight|bias)$", name)
        if self.interleaved and found:
            heads = shape.heads if found.group(1) == "q" else shape.kv_heads
            rows = _neighbours(heads, shape.head)
        if self.fused and ".query_key_value." in name:
            rows = np.arange(3 * shape.hidden).reshape(shape.heads, 3, shape.head)
            rows = rows.transpose(1, 0, 2).reshape(-1)
        norm = self.plus_one and re.search(r"norm\d*\.weight$", name)
        if ".linear_attn." in name:
            return _delta(there, name, shape)
        squeezed = name.endswith(".conv.conv.weight")
        return Tensor(there, rows, shift=1.0 if norm else 0.0, squeezed=squeezed)

    def _theirs(self, name: str) -> str:
        """A tensor's name as the gguf package knows it."""
        name = name.removeprefix("language_model.")
        for here, there in self.prefixes:
            if name.startswith(here):
                name = there + name.removeprefix(here)
                break
        mixtral = re.fullmatch(r"(.*block_sparse_moe)\.switch_mlp\.(\w+)\.(\w+)", name)
        if mixtral:
            around, leaf, kind = mixtral.groups()
            return f"{around}.experts.{_OLD_EXPERTS[leaf]}.{kind}"
        name = name.replace(".dt_bias", ".dt_proj.bias")
        name = name.replace(".e_score_correction_bias", ".e_score_correction.bias")
        return name.replace(".switch_mlp.", ".experts.")


def _neighbours(heads: int, size: int) -> np.ndarray:
    """Rows of q or k, whose pairs are (i, i + size / 2) in each head, as (2 i, 2 i + 1)."""
    one = np.arange(size).reshape(2, size // 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * size + one).reshape(-1)


def _delta(there: str, name: str, shape: Shape) -> Tensor:
    """Of a gated delta net (Yang et al. 2024, arXiv:2412.06464).

    There are more heads of values than of keys: those of one key stand together here, and there
    the first of every key before the second of any.
    """
    keys, values = int(shape.get("linear_num_key_heads")), int(shape.get("linear_num_value_heads"))
    size, leaf = int(shape.get("linear_value_head_dim")), name.split(".linear_attn.")[1]

    def heads(size: int) -> np.ndarray:
        one = np.arange(values * size).reshape(keys, values // keys, size)
        return one.transpose(1, 0, 2).reshape(-1)

    if leaf in ("in_proj_qkv.weight", "conv1d.weight"):
        before = 2 * keys * int(shape.get("linear_key_head_dim"))
        rows = np.concatenate([np.arange(before), before + heads(size)])
        return Tensor(there, rows, squeezed=leaf.startswith("conv1d"))
    if leaf == "in_proj_z.weight":
        return Tensor(there, heads(size))
    if leaf == "out_proj.weight":
        return Tensor(there, columns=heads(size))
    if leaf == "norm.weight":
        return Tensor(there)
    return Tensor(there, heads(1), decay=leaf == "A_log")


_OLD_EXPERTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


_PLAIN: tuple[Keys, ...] = (k.sizes, k.feed_forward, k.rms, r.rope)
_LLAMA: tuple[Keys, ...] = (k.sizes, k.feed_forward, k.rms, r.llama3_rope)
_NORMED: tuple[Keys, ...] = (k.sizes, k.feed_forward, k.layer_norm)
_GEMMA2: tuple[Keys, ...] = (*_PLAIN, k.soft_caps, k.window, k.head_scale)
_GEMMA3: tuple[Keys, ...] = (*_PLAIN, k.window, k.head_scale, k.every_sixth)

_QWEN35: tuple[Keys, ...] = (k.sizes, k.feed_forward, k.rms, r.sectioned_rope, k.delta_net)
_NEOX = ("model.", "gpt_neox.")

FAMILIES: dict[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, _LLAMA, interleaved=True),
    "mistral": Family(MODEL_ARCH.LLAMA, _LLAMA, interleaved=True),
    "mixtral": Family(MODEL_ARCH.LLAMA, (*_LLAMA, k.experts), interleaved=True),
    "qwen2": Family(MODEL_ARCH.QWEN2, _PLAIN),
    "qwen2_moe": Family(MODEL_ARCH.QWEN2MOE, (*_PLAIN, k.experts, k.shared_expert)),
    "qwen3": Family(MODEL_ARCH.QWEN3, _PLAIN),
    "qwen3_moe": Family(
        MODEL_ARCH.QWEN3MOE, (*_PLAIN, k.experts), demands={"norm_topk_prob": True}
    ),
    "gemma": Family(MODEL_ARCH.GEMMA, _PLAIN, plus_one=True),
    "gemma2": Family(MODEL_ARCH.GEMMA2, _GEMMA2, plus_one=True),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, _GEMMA3, plus_one=True),
    "phi3": Family(MODEL_ARCH.PHI3, (k.sizes, k.feed_forward, k.rms, r.long_rope, k.no_window)),
    "phi": Family(MODEL_ARCH.PHI2, (*_NORMED, r.partial_rope)),
    "olmo2": Family(MODEL_ARCH.OLMO2, _PLAIN, demands={"tie_word_embeddings": False}),
    "olmoe": Family(
        MODEL_ARCH.OLMOE, (*_PLAIN, k.experts, k.no_groups), demands={"norm_topk_prob": False}
    ),
    "starcoder2": Family(MODEL_ARCH.STARCODER2, (*_NORMED, r.rope)),
    "granite": Family(MODEL_ARCH.GRANITE, (*_PLAIN, k.multipliers), interleaved=True),
    "granitemoe": Family(
        MODEL_ARCH.GRANITE_MOE, (*_PLAIN, k.multipliers, k.experts), interleaved=True
    ),
    "smollm3": Family(MODEL_ARCH.SMOLLM3, (*_PLAIN, k.no_rope_in_fourth), interleaved=True),
    "stablelm": Family(MODEL_ARCH.STABLELM, (*_NORMED, r.partial_rope, k.parallel_residual)),
    "gpt_neox": Family(
        MODEL_ARCH.GPTNEOX,
        (*_NORMED, r.partial_rope, k.parallel_residual, k.no_groups),
        fused=True,
        prefixes=(("model.h.", "gpt_neox.layers."), ("model.embed_out", "embed_out"), _NEOX),
    ),
    "gpt2": Family(
        MODEL_ARCH.GPT2,
        (k.sizes, k.four_times, k.layer_norm),
        prefixes=(("model.", "transformer."),),
    ),
    "cohere": Family(
        MODEL_ARCH.COMMAND_R, (*_NORMED, r.rope, k.cohere_scale), demands={"use_qk_norm": False}
    ),
    "cohere2": Family(
        MODEL_ARCH.COHERE2, (*_NORMED, r.rope, k.cohere_scale, k.window, k.every_fourth)
    ),
    "glm4": Family(MODEL_ARCH.GLM4, (k.sizes, k.feed_forward, k.rms, r.partial_rope)),
    "ernie4_5": Family(MODEL_ARCH.ERNIE4_5, _PLAIN),
    "exaone4": Family(MODEL_ARCH.EXAONE4, _LLAMA, demands={"sliding_window_pattern": None}),
    "exaone": Family(MODEL_ARCH.EXAONE, _LLAMA),
    "seed_oss": Family(MODEL_ARCH.SEED_OSS, _PLAIN),
    "minicpm": Family(MODEL_ARCH.MINICPM, (*_PLAIN, k.minicpm_scales), interleaved=True),
    "nemotron": Family(MODEL_ARCH.NEMOTRON, (*_NORMED, r.partial_rope), plus_one=True),
    "qwen3_5": Family(MODEL_ARCH.QWEN35, _QWEN35),
    "qwen3_5_moe": Family(MODEL_ARCH.QWEN35MOE, (*_QWEN35, k.experts, k.shared_expert)),
    "gpt_oss": Family(
        MODEL_ARCH.GPT_OSS, (*_PLAIN, k.experts, k.wide_experts, k.window, k.alternating)
    ),
    "glm4_moe": Family(
        MODEL_ARCH.GLM4_MOE, (k.sizes, k.feed_forward, k.rms, r.partial_rope, k.routed)
    ),
    "dots1": Family(MODEL_ARCH.DOTS1, (*_PLAIN, k.routed, k.no_groups)),
    "lfm2": Family(MODEL_ARCH.LFM2, (k.sizes, k.rms, r.rope, k.short_convolutions)),
    "olmo3": Family(MODEL_ARCH.OLMO2, (*_PLAIN, k.window, k.told_windows)),
    "hunyuan_v1_dense": Family(
        MODEL_ARCH.HUNYUAN_DENSE, (k.sizes, k.feed_forward, k.rms, r.alpha_rope)
    ),
    "helium": Family(MODEL_ARCH.LLAMA, _PLAIN),
    "ministral3": Family(
        MODEL_ARCH.MISTRAL3, (k.sizes, k.feed_forward, k.rms, r.tempered_rope), interleaved=True
    ),
    "mimo": Family(MODEL_ARCH.QWEN2, _PLAIN),
}


def family_of(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The name of a model's family, and how it is written. Raises ExportError for others."""
    text = config.get("text_config") or {}
    name = str(text.get("model_type") or config.get("model_type"))
    found = FAMILIES.get(name) or FAMILIES.get(name.removesuffix("_text"))
    if found is None:
        raise ExportError(
            f"models of type {name} are not written to GGUF: their logits in llama.cpp have not "
            "been compared with MLX's. Write the model with --format hf and convert it with "
            f"llama.cpp's convert_hf_to_gguf.py. Written are {', '.join(sorted(FAMILIES))}"
        )
    return name, found
