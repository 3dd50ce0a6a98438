"""Which steps give transformers' names and shapes back: the inverse of each sanitize() in mlx-lm.

What is written is the layout that models are published in, which transformers of every version
reads. A family is in the table only if its inverse is known (proof.py has mlx-lm itself undo
it). Left out are families that transformers does not know (their Python comes with the model),
and those of which sanitize() takes something away for good: ernie4_5_moe's correction of its
router, the numbers that falcon_h1 multiplies into its weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxlora.errors import ExportError
from mlxlora.export.hf.steps import (
    Step,
    Tensors,
    changed,
    channels_first,
    gate_up,
    joined,
    latent,
    renamed,
    unstacked,
)

PROJECTION = r"(gate_proj|up_proj|down_proj)\.(weight|bias)"
EXPERTS = unstacked(rf"(.+\.mlp)\.switch_mlp\.{PROJECTION}", r"\1.experts.*.\2.\3")
BARE_EXPERTS = unstacked(rf"(.+\.mlp\.experts)\.{PROJECTION}", r"\1.*.\2.\3")
_W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
OLD_EXPERTS = tuple(
    unstacked(rf"(.+\.block_sparse_moe)\.switch_mlp\.{new}\.(\w+)", rf"\1.experts.*.{old}.\2")
    for new, old in _W.items()
)
LATENT = joined("embed_q.weight", "unembed_out.weight", "kv_b_proj.weight", latent)


FUSED_EXPERTS = (  # one parameter for all, whose name is no layer's and ends without .weight
    joined(
        "switch_mlp.gate_proj.weight", "switch_mlp.up_proj.weight", "experts.gate_up_proj", gate_up
    ),
    renamed(r"(.+)\.switch_mlp\.down_proj\.weight$", r"\1.experts.down_proj"),
)
GEMMA_EXPERTS = (
    joined("switch_glu.gate_proj.weight", "switch_glu.up_proj.weight", "gate_up_proj", gate_up),
    renamed(r"(.+)\.switch_glu\.down_proj\.weight$", r"\1.down_proj"),
)
FROM_ONE = changed(  # norms that transformers counts from 1, and mlx-lm from 0
    r".+\.(input_layernorm|post_attention_layernorm|q_norm|k_norm)\.weight|model\.norm\.weight",
    lambda weight: weight - 1,
)
CONVOLUTION = changed(r".+\.(conv1d|conv_1d|conv\.conv)\.weight", channels_first)
GRANITE = (
    joined(
        "switch_mlp.gate_proj.weight", "switch_mlp.up_proj.weight", "input_linear.weight", gate_up
    ),
    renamed(r"(.+)\.switch_mlp\.down_proj\.", r"\1.output_linear."),
)


@dataclass(frozen=True)
class Family:
    """How models of one model_type are written.

    architecture: transformers' class. unlike: in what, with this config, mlx-lm computes something
    else than transformers from the same weights.
    """

    architecture: str
    steps: tuple[Step, ...] = ()
    unlike: Callable[[Mapping[str, Any]], str | None] = lambda config: None  # why it is refused

    def there(self, tensors: Tensors) -> Tensors:
        """mlx-lm's tensors as transformers has them."""
        for step in self.steps:
            tensors = step(tensors)
        return tensors


def _whole_heads_turned(config: Mapping[str, Any]) -> str | None:
    if config.get("partial_rotary_factor", 0.5) == 1:
        return None
    return "mlx-lm rotates whole heads, and transformers a part of each (partial_rotary_factor)"


def _experts_weighed(config: Mapping[str, Any]) -> str | None:
    if config.get("num_experts", 16) == 1:
        return None
    return "mlx-lm lets the weights of a token's experts add up to 1, and transformers does not"


def _groups_normed(config: Mapping[str, Any]) -> str | None:
    if config.get("n_groups", config.get("mamba_n_groups", 1)) == 1:
        return None
    return "mlx-lm normalizes all groups of a recurrent block together, and transformers each alone"


# model_type -> family. In the first group sanitize() renames and changes nothing.
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "ministral3": Family("Ministral3ForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "gemma": Family("GemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM"),
    "gemma3_text": Family("Gemma3ForCausalLM"),
    "phi": Family("PhiForCausalLM"),
    "phi3": Family("Phi3ForCausalLM"),
    "cohere": Family("CohereForCausalLM"),
    "cohere2": Family("Cohere2ForCausalLM"),
    "olmo2": Family("Olmo2ForCausalLM"),
    "olmo3": Family("Olmo3ForCausalLM"),
    "starcoder2": Family("Starcoder2ForCausalLM"),
    "stablelm": Family("StableLmForCausalLM"),
    "glm": Family("GlmForCausalLM", unlike=_whole_heads_turned),
    "glm4": Family("Glm4ForCausalLM"),
    "granite": Family("GraniteForCausalLM"),
    "helium": Family("HeliumForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM"),
    "exaone4": Family("Exaone4ForCausalLM"),
    "ernie4_5": Family("Ernie4_5ForCausalLM"),
    "seed_oss": Family("SeedOssForCausalLM"),
    "nemotron": Family("NemotronForCausalLM"),
    "hunyuan_v1_dense": Family("HunYuanDenseV1ForCausalLM"),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM"),
    # renamed, turned or squeezed
    "gpt2": Family(
        "GPT2LMHeadModel",
        (
            changed(r".+\.(c_attn|c_proj|c_fc)\.weight", mx.transpose),
            renamed(r"model\.", ""),  # as published; transformers adds its own prefix
        ),
    ),
    "gptj": Family("GPTJForCausalLM", (renamed(r"model\.", "transformer."),)),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        (
            renamed(r"model\.embed_out\.", "embed_out."),
            renamed(r"model\.h\.", "gpt_neox.layers."),
            renamed(r"model\.", "gpt_neox."),
        ),
    ),
    "apertus": Family(
        "ApertusForCausalLM",
        (changed(r".+\.alpha_[pn]", lambda alpha: alpha.reshape(1)),),
    ),
    # convolutions and recurrent blocks
    "mamba": Family("MambaForCausalLM", (CONVOLUTION,)),
    "mamba2": Family("Mamba2ForCausalLM", (CONVOLUTION,), unlike=_groups_normed),
    "lfm2": Family("Lfm2ForCausalLM", (CONVOLUTION,)),
    "recurrent_gemma": Family("RecurrentGemmaForCausalLM", (CONVOLUTION,)),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", (CONVOLUTION, FROM_ONE)),
    "qwen3_5_moe_text": Family("Qwen3_5MoeForCausalLM", (*FUSED_EXPERTS, CONVOLUTION, FROM_ONE)),
    # experts
    "qwen2_moe": Family("Qwen2MoeForCausalLM", (EXPERTS,)),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", (EXPERTS,)),
    "olmoe": Family("OlmoeForCausalLM", (EXPERTS,)),
    "glm4_moe": Family("Glm4MoeForCausalLM", (EXPERTS,)),
    "solar_open": Family("SolarOpenForCausalLM", (EXPERTS,)),
    "mellum": Family("MellumForCausalLM", (EXPERTS,)),
    "dots1": Family("Dots1ForCausalLM", (BARE_EXPERTS,)),
    "afmoe": Family("AfmoeForCausalLM", (BARE_EXPERTS,)),
    "mixtral": Family("MixtralForCausalLM", OLD_EXPERTS),
    "phimoe": Family("PhimoeForCausalLM", OLD_EXPERTS),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM",
        (
            EXPERTS,
            renamed(r"(.+\.mlp)\.gate\.e_score_correction_bias$", r"\1.e_score_correction_bias"),
        ),
    ),
    "granitemoe": Family("GraniteMoeForCausalLM", GRANITE),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        (
            *GRANITE,
            CONVOLUTION,
            joined(
                "mlp.gate_proj.weight",
                "mlp.up_proj.weight",
                "shared_mlp.input_linear.weight",
                lambda gate, up: mx.concatenate([gate, up]),
            ),
            renamed(r"(.+)\.mlp\.down_proj\.", r"\1.shared_mlp.output_linear."),
        ),
        unlike=_groups_normed,
    ),
    "gemma4_text": Family("Gemma4ForCausalLM", GEMMA_EXPERTS),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        (
            CONVOLUTION,
            *(
                unstacked(
                    rf"(.+\.feed_forward)\.switch_mlp\.{new}\.weight", rf"\1.experts.*.{old}.weight"
                )
                for new, old in _W.items()
            ),
            *(renamed(rf"(.+\.feed_forward)\.{new}\.", rf"\1.{old}.") for new, old in _W.items()),
        ),
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        (
            CONVOLUTION,
            unstacked(r"(.+\.mixer)\.switch_mlp\.fc1\.weight", r"\1.experts.*.up_proj.weight"),
            unstacked(r"(.+\.mixer)\.switch_mlp\.fc2\.weight", r"\1.experts.*.down_proj.weight"),
        ),
    ),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", OLD_EXPERTS),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", (EXPERTS, LATENT)),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", (EXPERTS, LATENT)),
    "jamba": Family(
        "JambaForCausalLM",
        (
            CONVOLUTION,
            unstacked(rf"(.+\.feed_forward)\.switch_mlp\.{PROJECTION}", r"\1.experts.*.\2.\3"),
        ),
        unlike=_experts_weighed,
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        (
            EXPERTS,
            CONVOLUTION,
            FROM_ONE,
        ),
    ),
    # multi-latent attention
    "deepseek_v2": Family("DeepseekV2ForCausalLM", (EXPERTS,)),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", (EXPERTS, LATENT)),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", (EXPERTS, LATENT)),
}
# Models that also see: of them mlx-lm has, and what is written is, the language model alone.
# model_type -> that of the language model where the config does not say.
SEEING = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": None,
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
INNER = "language_model."  # the prefix of its weights in mlx-lm


def family_of(kind: str, config: Mapping[str, Any]) -> Family:
    """Raises ExportError for a family whose inverse is not known, or that is not the same there."""
    if kind not in FAMILIES:
        raise ExportError(
            f"models of type {kind} cannot be written for transformers: how to undo what mlx-lm "
            "does to their weights is not known here. "
            "mlxlora fuse --bits none writes them for mlx-lm"
        )
    reason = FAMILIES[kind].unlike(config)
    if reason:
        raise ExportError(f"this model of type {kind} would not be the same there: {reason}")
    return FAMILIES[kind]
