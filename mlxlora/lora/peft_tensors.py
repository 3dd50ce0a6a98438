"""The tensors of a PEFT adapter file, by the module they belong to.

A name is base_model.model.<module>.lora_A[.<adapter>][.weight], or the module's own weight where
it was trained whole; around it stands what torch, DDP and FSDP wrap models in. Nothing here knows
the base. Pickled files are never opened.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import mlx.core as mx

from mlxlora.errors import AdapterError
from mlxlora.lora.adapter import WEIGHTS as OURS
from mlxlora.lora.adapter import check_numbers
from mlxlora.lora.peft_config import CONFIG
from mlxlora.lora.targets import natural
from mlxlora.readers import safetensors_header

WEIGHTS = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt")

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
FACTORS = {A, B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE}
TOKENS = "trainable_tokens_delta"
_AROUND = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
_COPIES = {"original_module"}  # the base's own, beside what was trained


@dataclass
class Found:
    """What a file holds of a module.

    factors: lora_A (r, in) and lora_B (out, r), or lora_embedding_A (r, vocabulary) and
    lora_embedding_B (dims, r), and lora_magnitude_vector (out,). Each with its tensor's name.
    """

    factors: dict[str, mx.array] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)  # as factors: the names in the file


@dataclass
class Tensors:
    """modules: (name, how often PEFT wrapped it before) -> its factors."""

    modules: dict[tuple[str, int], Found] = field(default_factory=dict)
    whole: dict[str, mx.array] = field(default_factory=dict)  # trained weights, by name
    bases: dict[str, mx.array] = field(default_factory=dict)  # weights beneath the factors
    tokens: dict[str, mx.array] = field(default_factory=dict)  # embedding -> trained rows


def find_weights(directory: Path) -> Path:
    """The file of tensors. Raises AdapterError if there is none that can be opened."""
    if not os.path.lexists(directory / CONFIG):
        inside = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG}"))[:3]
        hint = " (it does not exist)" if not os.path.exists(directory) else ""
        hint = f"; there are {', '.join(inside)} in it" if inside else hint
        raise AdapterError(f"{directory} is no PEFT adapter: it has no {CONFIG}{hint}")
    file = directory / WEIGHTS
    if os.path.lexists(file):
        return file
    pickles = [name for name in PICKLES if os.path.lexists(directory / name)]
    if pickles:
        raise AdapterError(
            f"{directory / pickles[0]} is a pickle, which can run anything when it is opened, so "
            "it is not. Where you trust it: peft.PeftModel.from_pretrained(BASE, "
            "THIS).save_pretrained(NEW) writes it as safetensors"
        )
    ours = os.path.lexists(directory / OURS)
    hint = "; it is mlxlora's or mlx-lm's, and needs no import" if ours else ""
    raise AdapterError(f"{directory} has no {WEIGHTS}{hint}")


def read_tensors(file: Path) -> Tensors:
    """Every tensor, float32. Raises AdapterError naming those of which nothing can be made."""
    check_numbers(file, safetensors_header(file, AdapterError))
    arrays = cast(dict[str, mx.array], mx.load(str(file)))
    found, faults, adapters = Tensors(), [], set()
    for name, array in sorted(arrays.items(), key=lambda item: natural(item[0])):
        parts = _without_wrappers(name)
        kind = next((part for part in parts if part in FACTORS), None)
        if kind is None:
            fault = _add_other(found, parts, array.astype(mx.float32))
        else:
            place = parts.index(kind)
            adapter = [part for part in parts[place + 1 :] if part != "weight"]
            adapters |= set(adapter)
            fault = _add_factor(found, parts[:place], kind, adapter, name, array)
        if fault:
            faults.append(f"{name[:120]}: {fault}")
    if len(adapters) > 1:
        faults.append(
            f"it holds several adapters ({', '.join(sorted(adapters))}); save one of them"
        )
    if not arrays:
        faults.append("it holds no tensor")
    if faults:
        more = [f"and {len(faults) - 12} more"] if len(faults) > 12 else []
        raise AdapterError(f"{file} cannot be used:\n  " + "\n  ".join([*faults[:12], *more]))
    return found


def _without_wrappers(name: str) -> list[str]:
    parts = [part for part in name.split(".") if part not in _AROUND]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    while parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return parts


def _add_factor(
    found: Tensors, module: list[str], kind: str, adapter: list[str], name: str, array: mx.array
) -> str:
    """Put a factor in its place; returns what is wrong with it, or ''."""
    if len(adapter) > 1 or "bias" in adapter:
        return "only lora_A.weight and lora_B.weight, without a bias, can be used"
    key = (".".join(p for p in module if p != "base_layer"), module.count("base_layer"))
    own = found.modules.setdefault(key, Found())
    if kind in own.factors:
        return f"the same as {own.tensors[kind]}"
    own.factors[kind], own.tensors[kind] = array.astype(mx.float32), name
    return ""


def _add_other(found: Tensors, parts: list[str], array: mx.array) -> str:
    """Put a tensor that is no factor in its place; returns what is wrong with it, or ''."""
    if not parts:
        return "mlxlora does not know what this is"
    if _COPIES & set(parts):
        return ""
    if TOKENS in parts:
        place = parts.index(TOKENS)
        module = [part for part in parts[:place] if part != "token_adapter"]
        found.tokens[".".join(module)] = array
        return ""
    if parts[-1] not in ("weight", "bias"):
        return "mlxlora does not know what this is"
    if "base_layer" in parts:
        if parts[-1] == "bias":
            return "a trained bias of an adapted layer, for which mlxlora has no place"
        found.bases[".".join(part for part in parts[:-1] if part != "base_layer")] = array
        return ""
    module = list(_module_to_save(parts[:-1]))
    found.whole[".".join([*module, parts[-1]])] = array
    return ""


def _module_to_save(parts: list[str]) -> Iterator[str]:
    """A module's name without modules_to_save.<adapter>."""
    if "modules_to_save" not in parts:
        return iter(parts)
    return iter(parts[: parts.index("modules_to_save")])
