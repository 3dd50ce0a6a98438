"""A model's metadata as llama.cpp reads it: sizes, norms, windows, experts, scales.

Each function writes the keys of one trait; a family has several (families.py). Where
llama.cpp knows one way alone and the model has another, that is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.nn as nn
import numpy as np
from gguf import ExpertGatingFuncType, GGUFWriter

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
        self._scaled = True

    def get(self, *names: str, **default: Any) -> Any:
        """The first of these that mlx-lm knows, else config.json."""
        for source in (lambda name: getattr(self.args, name, None), self.config.get):
            for name in names:
                if (value := source(name)) is not None:
                    return value
        if "default" in default:
            return default["default"]
        raise ExportError(f"config.json says nothing of {names[0]}, which GGUF needs")

    @property
    def scaling(self) -> dict[str, Any]:
        """How rotations are scaled; {} if they are not, or are told otherwise."""
        if not self._scaled:
            return {}
        scaling = dict(self.get("rope_scaling", default=None) or {})
        kind = scaling.get("type") or scaling.get("rope_type") or "default"
        return {} if kind == "default" else {**scaling, "type": kind}

    def unscaled(self) -> None:
        """What scales rotations is told by tensors of their own."""
        self._scaled = False

    def demand(self, name: str, *values: Any) -> None:
        """Raise ExportError unless llama.cpp's one way of doing it is this model's."""
        if (found := self.get(name, default=None)) not in values:
            raise ExportError(
                f"the model has {name} = {found!r}, where llama.cpp knows {values[0]!r} alone; "
                "export with --format hf instead"
            )


def shape_of(model: nn.Module, config: Mapping[str, Any]) -> Shape:
    """The sizes of a model's text part."""
    text = config.get("text_config") or config
    inner = model.get("language_model", model)
    return Shape(getattr(inner, "args", model.args), text)


Keys = Callable[[GGUFWriter, Shape], Extra | None]


def sizes(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.blocks)
    writer.add_head_count(shape.heads)
    kinds = shape.get("layer_types", default=None) or []
    some = "conv" in kinds  # blocks without attention
    writer.add_head_count_kv(
        [shape.kv_heads * (k != "conv") for k in kinds] if some else shape.kv_heads
    )
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)


def feed_forward(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_feed_forward_length(int(shape.get("intermediate_size")))


def rms(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_layer_norm_rms_eps(float(shape.get("rms_norm_eps", "norm_eps")))


def layer_norm(writer: GGUFWriter, shape: Shape) -> None:
    names = ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps")
    writer.add_layer_norm_eps(float(shape.get(*names)))


def experts(writer: GGUFWriter, shape: Shape) -> None:
    """Of every block; llama.cpp has none without them in these families."""
    writer.add_expert_count(int(shape.get("num_experts", "num_local_experts")))
    writer.add_expert_used_count(int(shape.get("num_experts_per_tok")))
    width = shape.get("moe_intermediate_size", default=None)
    if width is not None:
        writer.add_expert_feed_forward_length(int(width))
    sparse = int(shape.get("decoder_sparse_step", default=1)) == 1
    if not sparse or shape.get("mlp_only_layers", default=[]):
        raise ExportError("llama.cpp wants experts in every block of this family")


def shared_expert(writer: GGUFWriter, shape: Shape) -> None:
    width = int(shape.get("shared_expert_intermediate_size"))
    writer.add_expert_shared_feed_forward_length(width)


def routed(writer: GGUFWriter, shape: Shape) -> None:
    """Experts as of DeepSeek-V3: chosen by sigmoids and a bias, beside some for every token."""
    writer.add_expert_count(int(shape.get("n_routed_experts")))
    writer.add_expert_used_count(int(shape.get("num_experts_per_tok")))
    writer.add_expert_feed_forward_length(int(shape.get("moe_intermediate_size")))
    writer.add_expert_shared_count(int(shape.get("n_shared_experts")))
    writer.add_leading_dense_block_count(int(shape.get("first_k_dense_replace")))
    writer.add_expert_weights_scale(float(shape.get("routed_scaling_factor")))
    writer.add_expert_weights_norm(bool(shape.get("norm_topk_prob")))
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    shape.demand("n_group", 1)
    shape.demand("scoring_func", "sigmoid")


def wide_experts(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_expert_feed_forward_length(int(shape.get("intermediate_size")))


def alternating(writer: GGUFWriter, shape: Shape) -> None:
    kinds = ("sliding_attention", "full_attention")
    shape.demand("layer_types", [kinds[block % 2] for block in range(shape.blocks)])


def told_windows(writer: GGUFWriter, shape: Shape) -> None:
    """Which blocks see a window alone."""
    kinds = shape.get("layer_types")
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])


def short_convolutions(writer: GGUFWriter, shape: Shape) -> None:
    """LFM2's blocks, and the width of their feed-forward parts."""
    writer.add_shortconv_l_cache(int(shape.get("conv_L_cache")))
    width = int(shape.get("block_ff_dim", "intermediate_size"))
    if shape.get("block_auto_adjust_ff_dim"):
        width = int(float(shape.get("block_ffn_dim_multiplier", default=1.0)) * int(2 * width / 3))
        step = int(shape.get("block_multiple_of"))
        width = step * ((width + step - 1) // step)
    writer.add_feed_forward_length(width)


def delta_net(writer: GGUFWriter, shape: Shape) -> None:
    """Qwen3.5's recurrent blocks, and which see everything instead."""
    size = int(shape.get("linear_key_head_dim"))
    shape.demand("linear_value_head_dim", size)
    shape.demand("rms_norm_eps", 1e-6)  # queries and keys are normed with it there, with 1e-6 here
    writer.add_ssm_state_size(size)
    writer.add_ssm_conv_kernel(int(shape.get("linear_conv_kernel_dim")))
    writer.add_ssm_group_count(int(shape.get("linear_num_key_heads")))
    values = int(shape.get("linear_num_value_heads"))
    writer.add_ssm_time_step_rank(values)
    writer.add_ssm_inner_size(values * size)
    writer.add_full_attention_interval(int(shape.get("full_attention_interval")))


def no_groups(writer: GGUFWriter, shape: Shape) -> None:
    shape.demand("num_key_value_heads", shape.heads)


def no_window(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_sliding_window(0)


def window(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_sliding_window(int(shape.get("sliding_window")))


def soft_caps(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_attn_logit_softcapping(float(shape.get("attn_logit_softcapping")))
    writer.add_final_logit_softcapping(float(shape.get("final_logit_softcapping")))


def head_scale(writer: GGUFWriter, shape: Shape) -> None:
    """Gemma's scores are divided by the root of this; llama.cpp tells it from the sizes."""
    largest = {46: "gemma2", 62: "gemma3_text"}.get(shape.blocks)
    own = shape.hidden // shape.heads if largest == shape.get("model_type") else shape.head
    shape.demand("query_pre_attn_scalar", own)


def every_sixth(writer: GGUFWriter, shape: Shape) -> None:
    """Gemma 3: which blocks see everything, and how the others rotate."""
    shape.demand("sliding_window_pattern", 6)
    shape.demand("rope_local_base_freq", 10000.0)


def every_fourth(writer: GGUFWriter, shape: Shape) -> None:
    shape.demand("sliding_window_pattern", 4)


def no_rope_in_fourth(writer: GGUFWriter, shape: Shape) -> None:
    own = [int((block + 1) % 4 != 0) for block in range(shape.blocks)]
    shape.demand("no_rope_layers", own)


def multipliers(writer: GGUFWriter, shape: Shape) -> None:
    """Granite's."""
    writer.add_attention_scale(float(shape.get("attention_multiplier")))
    writer.add_embedding_scale(float(shape.get("embedding_multiplier")))
    writer.add_residual_scale(float(shape.get("residual_multiplier")))
    writer.add_logit_scale(float(shape.get("logits_scaling")))


def minicpm_scales(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_embedding_scale(float(shape.get("scale_emb")))
    writer.add_residual_scale(float(shape.get("scale_depth")) / shape.blocks**0.5)
    writer.add_logit_scale(shape.hidden / float(shape.get("dim_model_base")))


def cohere_scale(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_logit_scale(float(shape.get("logit_scale")))


def parallel_residual(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_parallel_residual(bool(shape.get("use_parallel_residual", default=False)))


def four_times(writer: GGUFWriter, shape: Shape) -> None:
    """GPT-2's feed-forward blocks."""
    writer.add_feed_forward_length(4 * shape.hidden)
