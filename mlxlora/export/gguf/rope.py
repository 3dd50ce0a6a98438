"""How heads are rotated, as llama.cpp reads it: base, part, scaling, and factors as tensors.

RoPE (Su et al. 2021, arXiv:2104.09864). Whether pairs are neighbours or halves is not here: it is
the order of rows (families.py).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from mlxlora.errors import ExportError
from mlxlora.export.gguf.keys import Extra, Shape


def rope(writer: GGUFWriter, shape: Shape) -> Extra:
    """Rotations of whole heads."""
    return _rotations(writer, shape, shape.head)


def _rotations(writer: GGUFWriter, shape: Shape, dims: int) -> Extra:
    writer.add_rope_dimension_count(dims)
    base = float(shape.get("rope_theta", "rotary_emb_base", default=10000.0))
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
    raise ExportError(
        f"rope_scaling of type {kind} is not written to GGUF for this family; export with "
        "--format hf instead"
    )


def llama3_rope(writer: GGUFWriter, shape: Shape) -> Extra:
    """Rotations of whole heads, whose frequencies may be scaled one by one."""
    scaling = shape.scaling
    if scaling.get("type") != "llama3":
        return rope(writer, shape)
    shape.unscaled()
    rope(writer, shape)
    base = float(shape.get("rope_theta", "rotary_emb_base", default=10000.0))
    return {"rope_freqs.weight": _llama3(scaling, base, shape.head)}


def partial_rope(writer: GGUFWriter, shape: Shape) -> Extra:
    """Rotations of a part of each head."""
    part = float(shape.get("partial_rotary_factor", "rotary_pct", "rope_pct"))
    return _rotations(writer, shape, int(shape.head * part))


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
    shape.unscaled()
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


def alpha_rope(writer: GGUFWriter, shape: Shape) -> Extra:
    """Hunyuan's: another base of the frequencies."""
    scaling = shape.scaling
    shape.unscaled()
    if scaling and scaling.get("type") != "dynamic":
        raise ExportError(f"rope_scaling of type {scaling['type']} is not written to GGUF here")
    base = float(shape.get("rope_theta")) * float(scaling.get("alpha", 1.0)) ** (
        shape.head / (shape.head - 2)
    )
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(base)
    return {}


def tempered_rope(writer: GGUFWriter, shape: Shape) -> Extra:
    """Ministral 3: queries grow with the logarithm of their place."""
    scaling = dict(shape.get("rope_parameters"))
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(float(scaling["rope_theta"]))
    writer.add_attn_temperature_scale(float(scaling["llama_4_scaling_beta"]))
    if scaling.get("rope_type") != "yarn" or scaling.get("mscale") != scaling.get("mscale_all_dim"):
        raise ExportError("Ministral 3 is written to GGUF with YaRN and one mscale alone")
    writer.add_rope_scaling_yarn_log_mul(float(scaling["mscale_all_dim"]))
    return _yarn(writer, {**scaling, "mscale": 1, "mscale_all_dim": 0})


def sectioned_rope(writer: GGUFWriter, shape: Shape) -> Extra:
    """Positions in time, height and width, which for text are all the same."""
    told = shape.get("rope_parameters", "rope_scaling", default={})
    sections = list(told.get("mrope_section") or [11, 11, 10])
    if shape.scaling.get("type") == "mrope":
        shape.unscaled()
    writer.add_rope_dimension_sections([*sections, 0][:4])
    return partial_rope(writer, shape)
