"""The names and shapes that transformers has for weights that mlx-lm renamed, stacked or split.

The inverse of each architecture's sanitize() in mlx-lm, as steps over a stream of tensors; what
is written is the layout that models are published in, which transformers of every version reads.
A family is in the table only if its inverse is known; round_trip() has mlx-lm itself undo it.
Families that transformers does not know (their Python comes with the model) are left out, and
so are those from which sanitize() takes something away for good.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxlora.errors import ExportError
from mlxlora.lora.layers import weight_shape
from mlxlora.quantized import QUANTIZED

Tensors = Iterator[tuple[str, mx.array]]  # (name, array)
Step = Callable[[Tensors], Tensors]

PROVED_SIZE = 1 << 20  # numbers; of larger tensors only name and shape are tried at write time
_EXACT = 2039  # a prime: numbers below, plus or minus 1, are exact in every type used here


def renamed(pattern: str, name: str) -> Step:
    """Names that match begin otherwise; name is a template of re.sub."""

    def step(tensors: Tensors) -> Tensors:
        for path, array in tensors:
            yield re.sub(f"^{pattern}", name, path), array

    return step


def unstacked(pattern: str, name: str) -> Step:
    """(experts, ...) one by one. name: a template, with * for the number of the expert."""

    def step(tensors: Tensors) -> Tensors:
        for path, array in tensors:
            found = re.fullmatch(pattern, path)
            if found is None:
                yield path, array
                continue
            there = found.expand(name)
            for number in range(array.shape[0]):
                yield there.replace("*", str(number)), array[number]

    return step


def changed(pattern: str, change: Callable[[mx.array], mx.array]) -> Step:
    """Other numbers, or another shape, under the same name."""

    def step(tensors: Tensors) -> Tensors:
        for path, array in tensors:
            yield path, change(array) if re.fullmatch(pattern, path) else array

    return step


def joined(
    first: str, second: str, name: str, join: Callable[[mx.array, mx.array], mx.array]
) -> Step:
    """Two tensors of one module, by the ends of their names, as one; whichever comes first."""

    def step(tensors: Tensors) -> Tensors:
        waiting: dict[str, dict[str, mx.array]] = {}
        for path, array in tensors:
            end = next((e for e in (first, second) if path.endswith(f".{e}")), None)
            if end is None:
                yield path, array
                continue
            place = path.removesuffix(end)
            pair = waiting.setdefault(place, {})
            pair[end] = array
            if len(pair) == 2:
                del waiting[place]
                yield place + name, join(pair[first], pair[second])
        if waiting:
            raise ExportError(f"{next(iter(waiting))}* comes without its other half")

    return step


def _latent(embed_q: mx.array, unembed_out: mx.array) -> mx.array:
    """(heads, rank, k), (heads, v, rank) -> (heads * (k + v), rank), the keys of a head first."""
    whole = mx.concatenate([embed_q.swapaxes(-1, -2), unembed_out], axis=1)
    return whole.reshape(-1, whole.shape[-1])


def _gate_up(gate: mx.array, up: mx.array) -> mx.array:
    """(experts, n, in) twice -> (experts, 2 n, in)."""
    return mx.concatenate([gate, up], axis=1)


def _channels_first(weight: mx.array) -> mx.array:
    """Of a depthwise convolution: (channels, width, 1) -> (channels, 1, width)."""
    return weight.swapaxes(1, 2)


PROJECTION = r"(gate_proj|up_proj|down_proj)\.(weight|bias)"
EXPERTS = unstacked(rf"(.+\.mlp)\.switch_mlp\.{PROJECTION}", r"\1.experts.*.\2.\3")
BARE_EXPERTS = unstacked(rf"(.+\.mlp\.experts)\.{PROJECTION}", r"\1.*.\2.\3")
_W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
OLD_EXPERTS = tuple(
    unstacked(rf"(.+\.block_sparse_moe)\.switch_mlp\.{new}\.(\w+)", rf"\1.experts.*.{old}.\2")
    for new, old in _W.items()
)
LATENT = joined("embed_q.weight", "unembed_out.weight", "kv_b_proj.weight", _latent)
CONVOLUTION = changed(r".+\.conv1d\.weight", _channels_first)


@dataclass(frozen=True)
class Family:
    """How models of one model_type are written. architecture: transformers' class."""

    architecture: str
    steps: tuple[Step, ...] = ()

    def there(self, tensors: Tensors) -> Tensors:
        """mlx-lm's tensors as transformers has them."""
        for step in self.steps:
            tensors = step(tensors)
        return tensors


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
    "glm": Family("GlmForCausalLM"),
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
    "mamba2": Family("Mamba2ForCausalLM", (CONVOLUTION,)),
    "lfm2": Family("Lfm2ForCausalLM", (changed(r".+\.conv\.conv\.weight", _channels_first),)),
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
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        (
            joined(
                "switch_mlp.gate_proj.weight",
                "switch_mlp.up_proj.weight",
                "input_linear.weight",
                _gate_up,
            ),
            renamed(r"(.+)\.switch_mlp\.down_proj\.", r"\1.output_linear."),
        ),
    ),
    "jamba": Family(
        "JambaForCausalLM",
        (
            CONVOLUTION,
            unstacked(rf"(.+\.feed_forward)\.switch_mlp\.{PROJECTION}", r"\1.experts.*.\2.\3"),
        ),
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        (
            EXPERTS,
            CONVOLUTION,
            changed(
                r".+\.(input_layernorm|post_attention_layernorm|q_norm|k_norm)\.weight"
                r"|model\.norm\.weight",
                lambda weight: weight - 1,
            ),
        ),
    ),
    # multi-latent attention
    "deepseek_v2": Family("DeepseekV2ForCausalLM", (EXPERTS,)),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", (EXPERTS, LATENT)),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", (EXPERTS, LATENT)),
}
# Models that also see: of them mlx-lm has, and what is written is, the language model alone.
# model_type -> that of the language model where the config does not say.
SEEING = {"gemma3": "gemma3_text", "mistral3": None}
INNER = "language_model."  # the prefix of its weights in mlx-lm


def family_of(kind: str) -> Family:
    """Raises ExportError for a family whose inverse is not known."""
    if kind not in FAMILIES:
        raise ExportError(
            f"models of type {kind} cannot be written for transformers: how to undo what mlx-lm "
            "does to their weights is not known here. "
            "mlxlora fuse --bits none writes them for mlx-lm"
        )
    return FAMILIES[kind]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The model's parameters, unpacked where they are packed: name -> shape."""
    modules = dict(model.named_modules())
    found = {}
    for name, array in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if not isinstance(module, QUANTIZED):
            found[name] = tuple(array.shape)
        elif leaf in ("weight", "bias"):
            found[name] = weight_shape(module) if leaf == "weight" else tuple(array.shape)
    return found


def round_trip(model: nn.Module, family: Family) -> None:
    """Raise ExportError unless mlx-lm makes of what family writes what the model has.

    Tried with made-up numbers: the name and shape of every tensor, and the numbers themselves
    of all that are at most PROVED_SIZE large. The model is not changed.
    """
    wanted = shapes(model)
    made = {name: _made_up(n, shape) for n, (name, shape) in enumerate(wanted.items())}
    try:
        there = dict(family.there(iter(made.items())))
        twin = type(model)(model.args)
        back = twin.sanitize(there) if hasattr(twin, "sanitize") else there
        back = dict(tree_flatten(back))
        fault = _fault(wanted, back, set(shapes(twin)))
    except Exception as error:  # of whatever kind a sanitize raises
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise ExportError(
            f"mlx-lm's {family.architecture} is not what was expected, so it cannot be written "
            f"for transformers: {str(fault)[:300]}"
        )


def _fault(
    wanted: Mapping[str, tuple[int, ...]], back: Mapping[str, mx.array], own: set[str]
) -> str | None:
    """What differs after the way there and back; None if nothing does."""
    for names, what in ((back.keys() - wanted.keys(), "is new"), (own - back.keys(), "is missing")):
        if names:
            return f"{min(names)} {what}"
    for number, (name, shape) in enumerate(wanted.items()):
        if name not in back:
            return f"{name} is lost"
        if back[name].shape != shape:
            return f"{name} is {back[name].shape} and was {shape}"
        # Made once more: some sanitize() write into what they are given.
        if math.prod(shape) <= PROVED_SIZE and not mx.array_equal(
            back[name], _made_up(number, shape)
        ):
            return f"{name} holds other numbers"
    return None


def _made_up(number: int, shape: tuple[int, ...]) -> mx.array:
    """Numbers that differ along every axis and from tensor to tensor; not computed yet."""
    total: Any = mx.array(number * 97 + 1)
    for axis, (size, factor) in enumerate(zip(shape, (31, 7, 3, 11), strict=False)):
        along = mx.arange(size).reshape([-1 if other == axis else 1 for other in range(len(shape))])
        total = total + along * factor
    return mx.broadcast_to(total % _EXACT, shape).astype(mx.float16)
