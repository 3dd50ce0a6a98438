"""Families of models as llama.cpp knows them: their metadata, and what is done to their tensors.

A family is one line in FAMILIES, and only stands there if tests/test_gguf.py has compared its
logits in llama.cpp with MLX's. Names of tensors come from the gguf package; what mlx-lm names
otherwise than transformers is put back first.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType

from mlxlora.errors import ExportError

Extra = dict[str, np.ndarray]  # tensors of the file that the model has none of, float32
DEFAULT_CONTEXT = 2048  # where a config does not tell; llama.cpp asks for one


class Shape:
    """The sizes of a model, by one name each whatever its family calls them."""

    def __init__(self, args: Any, config: Mapping[str, Any]) -> None:
        """args: mlx-lm's, with its defaults; config: the text part of config.json."""
        self.args, self.config = args, config
        self.blocks = int(self.get("num_hidden_layers", "n_layer", "n_layers", "num_layers"))
        self.hidden = int(self.get("hidden_size", "n_embd"))
        self.heads = int(self.get("num_attention_heads", "n_head"))
        self.kv_heads = int(self.get("num_key_value_heads", default=self.heads) or self.heads)
        self.head = int(self.get("head_dim", default=None) or self.hidden // self.heads)
        self.context = int(
            self.get("max_position_embeddings", "n_positions", default=None) or DEFAULT_CONTEXT
        )
        self.rotated = self.head

    def get(self, *names: str, **default: Any) -> Any:
        """The first of these that mlx-lm, or config.json, knows."""
        for name in names:
            value = getattr(self.args, name, None)
            value = self.config.get(name) if value is None else value
            if value is not None:
                return value
        if "default" in default:
            return default["default"]
        raise ExportError(f"config.json says nothing of {names[0]}, which GGUF needs")

    @property
    def scaling(self) -> dict[str, Any]:
        """How rotations are scaled; {} if they are not."""
        scaling = dict(self.get("rope_scaling", default=None) or {})
        kind = scaling.get("type") or scaling.get("rope_type") or "default"
        return {} if kind == "default" else {**scaling, "type": kind}


Keys = Callable[[GGUFWriter, Shape], Extra | None]


def sizes(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.blocks)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)


def feed_forward(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_feed_forward_length(int(shape.get("intermediate_size")))


def rms(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_layer_norm_rms_eps(float(shape.get("rms_norm_eps", "norm_eps")))


def layer_norm(writer: GGUFWriter, shape: Shape) -> None:
    names = ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps")
    writer.add_layer_norm_eps(float(shape.get(*names)))


def rope(writer: GGUFWriter, shape: Shape) -> Extra:
    """Rotations of whole heads."""
    writer.add_rope_dimension_count(shape.rotated)
    base = float(shape.get("rope_theta", default=10000.0))
    writer.add_rope_freq_base(base)
    scaling = shape.scaling
    if not scaling:
        return {}
    kind = scaling["type"]
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        return {}
    if kind == "yarn":
        return _yarn(writer, scaling)
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3(scaling, base, shape.rotated)}
    raise ExportError(
        f"rope_scaling of type {kind} is not written to GGUF for this family; export with "
        "--format hf instead"
    )


def partial_rope(writer: GGUFWriter, shape: Shape) -> Extra:
    """Rotations of a part of each head."""
    part = float(shape.get("partial_rotary_factor", "rotary_pct", "rope_pct"))
    shape.rotated = int(shape.head * part)
    return rope(writer, shape)


def _yarn(writer: GGUFWriter, scaling: Mapping[str, Any]) -> Extra:
    """Peng et al. 2023 (arXiv:2309.00071): llama.cpp computes the ramp and 0.1 ln(s) + 1 itself."""
    if scaling.get("mscale", 1) != 1 or scaling.get("mscale_all_dim"):
        raise ExportError("rope_scaling yarn with mscale is not written to GGUF for this family")
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(scaling["factor"]))
    writer.add_rope_scaling_orig_ctx_len(int(scaling.get("original_max_position_embeddings", 4096)))
    for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        getattr(writer, f"add_rope_scaling_yarn_{name}")(float(scaling.get(name, default)))
    return {}


def _llama3(scaling: Mapping[str, Any], base: float, dims: int) -> np.ndarray:
    """What each frequency is divided by: 1 for fast ones, factor for slow ones, smooth between.

    As in transformers' modeling_rope_utils.py, after Meta's reference code of Llama 3.1.
    """
    factor = float(scaling["factor"])
    low = float(scaling.get("low_freq_factor", 1.0))
    high = float(scaling.get("high_freq_factor", 4.0))
    old = float(scaling.get("original_max_position_embeddings", 8192))
    wavelengths = 2 * math.pi * base ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    smooth = np.clip((old / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), dtype=np.float32)


def long_rope(writer: GGUFWriter, shape: Shape) -> Extra:
    """Phi-3: other factors up to and beyond the original context (arXiv:2402.13753)."""
    scaling = shape.scaling
    if scaling.get("type") not in ("su", "longrope"):
        old = int(shape.get("original_max_position_embeddings", default=shape.context))
        writer.add_rope_scaling_orig_ctx_len(old)
        return partial_rope(writer, shape)
    shape.config = {**shape.config, "rope_scaling": None}
    shape.args.rope_scaling = None
    partial_rope(writer, shape)
    old = int(shape.get("original_max_position_embeddings"))
    writer.add_rope_scaling_orig_ctx_len(old)
    grown = shape.context / old
    attention = math.sqrt(1 + math.log(grown) / math.log(old)) if grown > 1 else 1.0
    writer.add_rope_scaling_attn_factors(attention)
    return {
        f"rope_factors_{kind}.weight": np.asarray(scaling[f"{kind}_factor"], dtype=np.float32)
        for kind in ("long", "short")
    }


def no_window(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_sliding_window(0)


def soft_caps(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_attn_logit_softcapping(float(shape.get("attn_logit_softcapping")))
    writer.add_final_logit_softcapping(float(shape.get("final_logit_softcapping")))


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model as it is in the file: x[rows] + shift."""

    name: str
    rows: np.ndarray | None = None  # a permutation of the first axis
    shift: float = 0.0

    def stored(self, array: mx.array) -> mx.array:
        """The model's tensor as it is in the file."""
        if self.rows is not None:
            array = array[mx.array(self.rows)]
        return array.astype(mx.float32) + self.shift if self.shift else array

    def restored(self, array: mx.array) -> mx.array:
        """The inverse of stored()."""
        if self.rows is not None:
            array = array[mx.array(np.argsort(self.rows))]
        return array - self.shift if self.shift else array


@dataclass(frozen=True)
class Family:
    """How a family is written."""

    arch: MODEL_ARCH
    keys: tuple[Keys, ...]
    interleaved: bool = False  # llama.cpp rotates neighbours, mlx-lm halves: q and k permuted
    plus_one: bool = False  # norms multiply by 1 + weight here, by weight there

    @property
    def arch_name(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.arch]

    def describe(self, writer: GGUFWriter, shape: Shape) -> Extra:
        """Write the metadata; returns the tensors that go with it."""
        extra: Extra = {}
        for keys in self.keys:
            extra |= keys(writer, shape) or {}
        return extra

    def tensor(self, name: str, shape: Shape, names: gguf.TensorNameMap) -> Tensor | None:
        """Where a tensor of the model goes; None if llama.cpp has no place for it."""
        there = names.get_name(_theirs(name), try_suffixes=(".weight", ".bias"))
        if there is None:
            return None
        rows = None
        found = re.search(r"\.(q|k)_proj\.(weight|bias)$", name)
        if self.interleaved and found:
            heads = shape.heads if found.group(1) == "q" else shape.kv_heads
            rows = _neighbours(heads, shape.head, shape.rotated)
        norm = self.plus_one and name.endswith("norm.weight")
        return Tensor(there, rows, 1.0 if norm else 0.0)


def _neighbours(heads: int, size: int, rotated: int) -> np.ndarray:
    """Rows of q or k, whose pairs are (i, i + rotated / 2), so that they are (2 i, 2 i + 1)."""
    one = np.arange(size)
    one[:rotated] = np.arange(rotated).reshape(2, rotated // 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * size + one).reshape(-1)


_OLD_EXPERTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _theirs(name: str) -> str:
    """A tensor's name as the gguf package knows it."""
    name = name.removeprefix("language_model.")
    mixtral = re.fullmatch(r"(.*block_sparse_moe)\.switch_mlp\.(\w+)\.(\w+)", name)
    if mixtral:
        around, leaf, kind = mixtral.groups()
        return f"{around}.experts.{_OLD_EXPERTS[leaf]}.{kind}"
    return name.replace(".switch_mlp.", ".experts.")


_LLAMA: tuple[Keys, ...] = (sizes, feed_forward, rms, rope)
_GEMMA2: tuple[Keys, ...] = (*_LLAMA, soft_caps)

FAMILIES: dict[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, _LLAMA, interleaved=True),
    "mistral": Family(MODEL_ARCH.LLAMA, _LLAMA, interleaved=True),
    "qwen2": Family(MODEL_ARCH.QWEN2, _LLAMA),
    "qwen3": Family(MODEL_ARCH.QWEN3, _LLAMA),
    "gemma": Family(MODEL_ARCH.GEMMA, _LLAMA, plus_one=True),
    "phi3": Family(MODEL_ARCH.PHI3, (sizes, feed_forward, rms, long_rope, no_window)),
}


def family_of(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The name of a model's family, and how it is written. Raises ExportError for others."""
    text = config.get("text_config") or {}
    name = str(text.get("model_type") or config.get("model_type"))
    found = FAMILIES.get(name)
    if found is None:
        raise ExportError(
            f"models of type {name} are not written to GGUF: their logits in llama.cpp have not "
            "been compared with MLX's. Write the model with --format hf and convert it with "
            f"llama.cpp's convert_hf_to_gguf.py. Written are {', '.join(sorted(FAMILIES))}"
        )
    return name, found


def shape_of(model: nn.Module, config: Mapping[str, Any]) -> Shape:
    """The sizes of a model's text part."""
    text = config.get("text_config") or config
    inner = model.get("language_model", model)
    return Shape(getattr(inner, "args", model.args), text)
