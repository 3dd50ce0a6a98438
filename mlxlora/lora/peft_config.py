"""What a PEFT adapter_config.json says: which modules, which ranks and scales, and what else.

Every field is known here, or has no value, or is refused by name: one that is passed over could
change what the adapter computes. Patterns match as PEFT 0.21 matches them (its
tuners_utils.check_target_module_exists and other.get_pattern_key); they are regular expressions
of whoever made the file, so a slow one ends with Ctrl-C.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora.config import MAX_RANK
from mlxlora.errors import AdapterError
from mlxlora.readers import read_json

CONFIG = "adapter_config.json"
KIND = "LORA"
ALL_LINEAR = "all-linear"

# What is read.
_READ = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "trainable_token_indices", "ensure_weight_tying"),
    *("init_lora_weights", "lora_dropout", "base_model_name_or_path", "peft_version"),
}
# What says how it was trained, or where it is from, and changes nothing of what it computes.
# bias and fan_in_fan_out are seen in the tensors, and stand for nothing where none are.
_NO_MATTER = {
    *("task_type", "auto_mapping", "revision", "inference_mode", "bias", "fan_in_fan_out"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("velora_config", "qalora_group_size", "runtime_config", "lora_dtype", "lorap_lr_ratio"),
    *("lorap_emb_lr", "save_embedding_layers"),
}
# Fields that make another layer of it: name -> what layer.
_OTHER_LAYERS = {
    "lora_bias": "it adds a bias to B",
    "use_qalora": "it pools the layer's input",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "invocation_string": "it acts only after certain tokens",
    "monteclora_config": "it is sampled",
    "layer_replication": "it repeats blocks of the base",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it chooses among adapters, token by token",
    "kasa_config": "it changes the base's weights",
    "megatron_config": "it is of Megatron's layers",
}
# init_lora_weights after which the base's weights are others than they were, until the adapter
# is converted (then PEFT writes true); and those after which they are the same.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class PeftConfig:
    """One adapter_config.json of a LoRA that can be read. Names are transformers'."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool
    dora: bool
    targets: str | tuple[str, ...] | None
    parameters: tuple[str, ...]
    excluded: str | tuple[str, ...]
    blocks: tuple[int, ...]
    blocks_pattern: tuple[str, ...]
    whole: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]  # embedding ("": the model's own) -> trained tokens
    tied: bool
    dropout: float
    base: str
    version: str

    def rank_of(self, name: str) -> int:
        return next((r for p, r in self.rank_pattern.items() if _ends(p, name)), self.rank)

    def scale_of(self, name: str) -> float:
        alpha = next((a for p, a in self.alpha_pattern.items() if _ends(p, name)), self.alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def is_target(self, name: str) -> bool:
        """Whether PEFT would adapt a module of this name."""
        if _chosen(name, self.excluded):
            return False
        if any(re.match(rf"(^|.*\.){one}($|\..*)", name) for one in self.whole):
            return False
        if self.targets is None:  # PEFT then has targets of its own for each family
            return not self.parameters
        if isinstance(self.targets, str):
            return self.targets.lower() == ALL_LINEAR or bool(re.fullmatch(self.targets, name))
        if name in self.targets:
            return True
        return _chosen(name, self.targets) and (not self.blocks or self._in_blocks(name))

    def is_parameter(self, name: str) -> bool:
        """Whether PEFT would adapt a parameter of this name as such."""
        return _chosen(name, self.parameters)

    def _in_blocks(self, name: str) -> bool:
        patterns = [rf"(?:^|.*?\.){p}\.(\d{{1,9}})\." for p in self.blocks_pattern]
        found = (re.match(p, name) for p in patterns or [r".*?\.[^.]*\.(\d{1,9})\."])
        number = next((m.group(1) for m in found if m), None)
        return number is not None and int(number) in self.blocks


def read_peft_config(directory: Path) -> PeftConfig:
    """Raises AdapterError naming every field that is of no use, or not understood."""
    file = directory / CONFIG
    told = read_json(file, AdapterError)
    kind = told.get("peft_type")
    if kind is None:
        raise AdapterError(
            f"{file} is of no PEFT adapter: it names no peft_type. What mlx-lm or mlxlora wrote "
            "needs no import"
        )
    if kind != KIND:
        raise AdapterError(
            f"{file} is of type {str(kind)[:40]!r}; only LoRA ({KIND}) can be imported"
        )
    faults = [*_strange(told), *_about_base(told)]
    values = _Values(told, faults)
    config = PeftConfig(
        rank=values.number("r", 8, whole=True),
        alpha=values.number("lora_alpha", 8),
        rank_pattern=values.pattern("rank_pattern", whole=True),
        alpha_pattern=values.pattern("alpha_pattern"),
        rank_stabilized=values.flag("use_rslora"),
        dora=values.flag("use_dora"),
        targets=values.names("target_modules") if told.get("target_modules") else None,
        parameters=values.several("target_parameters"),
        excluded=values.names("exclude_modules"),
        blocks=values.numbers("layers_to_transform"),
        blocks_pattern=values.several("layers_pattern"),
        whole=values.several("modules_to_save"),
        tokens=values.tokens("trainable_token_indices"),
        tied=values.flag("ensure_weight_tying"),
        dropout=values.number("lora_dropout", 0.0, least=0.0, most=1.0),
        base=values.text("base_model_name_or_path"),
        version=values.text("peft_version"),
    )
    faults += _bad_patterns(config)
    if faults:
        raise AdapterError(f"{file} cannot be used:\n  " + "\n  ".join(faults))
    return config


def _strange(told: Mapping[str, Any]) -> list[str]:
    faults = [
        f"{name} = {_shown(told[name])}: {why}, which mlxlora has no layer for"
        for name, why in _OTHER_LAYERS.items()
        if told.get(name)
    ]
    unknown = {
        name: value
        for name, value in told.items()
        if name not in _READ | _NO_MATTER | _OTHER_LAYERS.keys() and value
    }
    return faults + [
        f"{name[:60]} = {_shown(value)}: a field that mlxlora does not know; take it out of the "
        "file if it changes nothing of what the adapter computes"
        for name, value in unknown.items()
    ]


def _about_base(told: Mapping[str, Any]) -> list[str]:
    """Why init_lora_weights is none, if the adapter is relative to another base than it says."""
    start = told.get("init_lora_weights", True)
    if start is None or isinstance(start, bool) or str(start).lower() in _KEEPS_BASE:
        return []
    begins = f"init_lora_weights = {_shown(start)}: "
    if not str(start).lower().startswith(_CHANGES_BASE):
        return [begins + "a start that mlxlora does not know"]
    how = (
        "merge it there into that base"
        if str(start).lower() == "loftq"
        else "save it there with save_pretrained(OUT, path_initial_model_for_weight_conversion="
        "START), START being the adapter as it was before training"
    )
    return [
        begins + "it is relative to weights that PEFT changed before training, and would be "
        f"silently wrong over this base; {how}"
    ]


class _Values:
    """Fields as values of their types; what is not of its type is a fault."""

    def __init__(self, told: Mapping[str, Any], faults: list[str]) -> None:
        self.told, self.faults = told, faults

    def _fault(self, name: str, says: str) -> None:
        self.faults.append(f"{name} must be {says}, not {_shown(self.told.get(name))}")

    def number(
        self,
        name: str,
        default: float,
        *,
        whole: bool = False,
        least: float = -1e6,
        most: float = 1e6,
    ) -> Any:
        value = self.told.get(name, default)
        if not _is_number(value, whole, least, most):
            self._fault(name, "a whole number from 1 to 65,536" if whole else "a number")
            return default
        return value

    def pattern(self, name: str, *, whole: bool = False) -> dict[str, Any]:
        value = self.told.get(name) or {}
        if not isinstance(value, dict) or not all(_is_number(v, whole) for v in value.values()):
            self._fault(name, "an object of numbers")
            return {}
        return value

    def flag(self, name: str) -> bool:
        value = self.told.get(name) or False
        if not isinstance(value, bool):
            self._fault(name, "true or false")
        return bool(value)

    def text(self, name: str) -> str:
        value = self.told.get(name) or ""
        return value if isinstance(value, str) else ""

    def names(self, name: str) -> str | tuple[str, ...]:
        value = self.told.get(name)
        return value if isinstance(value, str) else self.several(name)

    def several(self, name: str) -> tuple[str, ...]:
        value = self.told.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self._fault(name, "a list of names")
            return ()
        return tuple(value)

    def numbers(self, name: str) -> tuple[int, ...]:
        value = self.told.get(name)
        value = [] if value is None else [value] if type(value) is int else value
        if not _counts(value):
            self._fault(name, "whole numbers")
            return ()
        return tuple(value)

    def tokens(self, name: str) -> dict[str, tuple[int, ...]]:
        value = self.told.get(name) or {}
        value = {"": value} if isinstance(value, list) else value
        if not isinstance(value, dict) or not all(map(_counts, value.values())):
            self._fault(name, "token numbers, for each embedding")
            return {}
        return {k: tuple(v) for k, v in value.items()}


def _bad_patterns(config: PeftConfig) -> list[str]:
    """Whatever is used as a regular expression and is none."""
    used = {
        "target_modules": [config.targets] if isinstance(config.targets, str) else [],
        "exclude_modules": [config.excluded] if isinstance(config.excluded, str) else [],
        "modules_to_save": [*config.whole],
        "layers_pattern": [*config.blocks_pattern],
        "rank_pattern": [*config.rank_pattern],
        "alpha_pattern": [*config.alpha_pattern],
    }
    faults = []
    for name, patterns in used.items():
        for pattern in patterns:
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, OverflowError, RecursionError) as error:
                faults.append(f"{name}: {_shown(pattern)} is no regular expression: {error}")
    return faults


def _chosen(name: str, wanted: str | Sequence[str]) -> bool:
    """By a regular expression of the whole name, or by its last parts."""
    if isinstance(wanted, str):
        return bool(re.fullmatch(wanted, name))
    return name in wanted or any(name.endswith(f".{one}") for one in wanted)


def _ends(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _is_number(value: Any, whole: bool, least: float = -1e6, most: float = 1e6) -> bool:
    if whole:
        return type(value) is int and 1 <= value <= MAX_RANK
    return type(value) in (int, float) and least <= value <= most


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 31 for n in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
