"""Modules by two names: transformers', which every other format uses, and mlx-lm's.

Mostly they are one. What differs in general is which wrappers stand around the blocks (model,
language_model, transformer) and what their list is called; experts, which transformers keeps
one by one (or, from version 5, gate and up projection as one parameter) and mlx-lm stacked; and
what a family renames when mlx-lm loads it, which its own sanitize() is asked for.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxlora.lora.layers import EXPERTS, LoRAEmbedding, layer_for, weight_shape

# Parts of a path that stand around a language model and may be there, or not.
WRAPPERS = {"model", "language_model", "text_model", "transformer", "backbone", "gpt_neox"}
BLOCKS = {"layers", "h", "blocks"}  # what families call the list of their blocks
HEADS = ("lm_head", "embed_out")
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
OLD_EXPERTS = {"w1": GATE, "w3": UP, "w2": DOWN}  # Mixtral's names, and of those after it
ONE_EXPERT = re.compile(r"(?P<container>.+\.experts)\.(?P<number>\d{1,9})\.(?P<leaf>\w+)")

# Families whose experts transformers names one by one, in files at least: those of mlx-lm that
# stack them when they are loaded.
_BY_NUMBER = {
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "hunyuan", "mellum", "exaone_moe"),
    *("deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite"),
    *("dots1", "ernie4_5_moe", "bailing_moe", "afmoe", "longcat_flash", "mimo_v2_flash", "jamba"),
}
_OLD_STYLE = {"mixtral", "phimoe", "minimax", "lfm2_moe"}
# Families in which mlx-lm joins, splits or renames what transformers has, in ways not undone here.
_UNLIKE = {
    *("hunyuan", "granitemoehybrid", "minimax_m3_vl", "muse_spark", "kimi_linear", "kimi_k3"),
    *("step3p5", "deepseek_v41", "phixtral", "dbrx", "lfm2_moe"),
}
# Parts of paths that only mlx-lm has: halves of kv_b_proj, and layers inside a router.
_ONLY_HERE = re.compile(r"\b(embed_q|unembed_out)$|\.gate\.")
# Modules whose weights mlx-lm multiplies or normalizes when it loads them, by family: what is
# added to such a weight here is not what is added to it there.
_REWRITTEN = {
    "falcon_h1": re.compile(""),
    **dict.fromkeys(("baichuan_m1", "bailing_moe", "bailing_moe_linear"), re.compile("lm_head")),
}
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
# Families that mlx-lm gives other wrappers than transformers: model_type -> (here, there).
_PREFIXES = {
    "gpt2": ("model.", "transformer."),
    "gptj": ("model.", "transformer."),
    "gpt_bigcode": ("model.", "transformer."),
    "exaone": ("model.", "transformer."),
    "gpt_neox": ("model.h.", "gpt_neox.layers."),
}


class Names:
    """Both ways between the names of a model's modules that can be adapted.

    there: a name in transformers; here: a path in this model.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        self.model, self.config = model, config
        self.modules = {p: m for p, m in model.named_modules() if layer_for(m) is not None}

    def here(self, name: str, shape: tuple[int, ...] = (1, 1)) -> str | None:
        """The path of a module that transformers gives this name, or None.

        shape of its weight, for families that rename by way of their sanitize().
        """
        if name in self.modules:
            return name
        return self._by_core.get(_core(name)) or self._renamed(name, shape)

    def there(self, path: str) -> list[str]:
        """The names in transformers of the module at this path: several for stacked experts.

        None at all if it is not known, or if transformers has nothing that is the same.
        """
        if self.rewritten(path) or _ONLY_HERE.search(path):
            return []
        if not isinstance(self.modules.get(path), EXPERTS):
            return [] if self._kind in _UNLIKE else [self._outside(path)]
        container, _, leaf = path.rpartition(".")
        around, _, last = container.rpartition(".")
        kind = self._kind
        if kind not in _BY_NUMBER | _OLD_STYLE or last not in ("switch_mlp", "experts"):
            return []
        if kind in _OLD_STYLE:
            leaf = next(old for old, new in OLD_EXPERTS.items() if new == leaf)
        count = weight_shape(self.modules[path])[0]
        return [f"{self._outside(around)}.experts.{n}.{leaf}" for n in range(count)]

    def experts(self, name: str) -> dict[str, str]:
        """Leaf -> path of the stacked experts in the block that a name in transformers is in."""
        block = _block(name)
        found: dict[str, str] = {}
        for path, module in self.modules.items():
            if isinstance(module, EXPERTS) and block is not None and _block(path) == block:
                leaf = path.rpartition(".")[2]
                if leaf in found:
                    return {}  # two sets of experts in a block: which is meant is not known
                found[leaf] = path
        return found

    def rewritten(self, path: str) -> bool:
        """Whether mlx-lm has other numbers in this weight than transformers."""
        pattern = _REWRITTEN.get(self._kind)
        return pattern is not None and pattern.search(path) is not None

    @cached_property
    def embedding(self) -> str | None:
        """The path of the token embedding."""
        found = [p for p, m in self.modules.items() if layer_for(m) is LoRAEmbedding]
        named = [path for path in found if path.rpartition(".")[2] in _EMBEDDINGS]
        return next(iter(named or found), None)

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding, so that it has no module of its own."""
        return not any(_core(path) in HEADS for path in self.modules)

    @property
    def _kind(self) -> str:
        text = self.config.get("text_config") or {}
        return str(text.get("model_type") or self.config.get("model_type"))

    @cached_property
    def _by_core(self) -> dict[str, str]:
        found: dict[str, list[str]] = {}
        for path in self.modules:
            found.setdefault(_core(path), []).append(path)
        return {core: paths[0] for core, paths in found.items() if len(paths) == 1}

    def _outside(self, path: str) -> str:
        """transformers' name of what is not experts."""
        here, there = _PREFIXES.get(self._kind, ("", ""))
        if here and path.startswith(here):
            return there + path.removeprefix(here)
        inner = path.removeprefix("language_model.")
        if inner == path:
            return path
        architecture = str((self.config.get("architectures") or [""])[0])
        if architecture.endswith("ForCausalLM") or not inner.startswith("model."):
            return inner
        return f"model.language_{inner}"  # model.language_model.layers..., from version 4.52 on

    @cached_property
    def _twin(self) -> nn.Module | None:
        """Another model of this family, whose sanitize() may do to it what it likes."""
        try:
            return type(self.model)(self.model.args)
        except Exception:  # of sixty families
            return None

    def _renamed(self, name: str, shape: tuple[int, ...]) -> str | None:
        try:
            weights = self._twin.sanitize({f"{name}.weight": mx.zeros(shape)})  # type: ignore
            (renamed,) = (path for path, _ in tree_flatten(dict(weights)))
        except Exception:  # it wants other tensors beside this one, or there is none
            return None
        path = renamed.removesuffix(".weight")
        return path if path in self.modules and path != renamed else None


def _core(name: str) -> str:
    """A name without what families wrap around it differently."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        parts = parts[1:]
    if parts[0] in BLOCKS and len(parts) > 1 and parts[1].isdigit():
        parts[0] = "layers"
    # transformers 5 says mlp for what Mixtral and its kin had as block_sparse_moe
    return ".".join("mlp" if part == "block_sparse_moe" else part for part in parts)


def _block(name: str) -> str | None:
    """The number of the block that a name or path is in."""
    found = re.match(r"layers\.(\d+)\.", _core(name))
    return found.group(1) if found else None
