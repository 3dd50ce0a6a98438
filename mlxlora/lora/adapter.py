"""Adapter: a trained adapter as a value, and its directory on disk.

The directory is one that mlx-lm loads as it is: adapters.safetensors with tensors named
<module>.lora_a / .lora_b, and adapter_config.json with one rank and one scale. Modules are
named by their full paths, so exactly these are adapted, whatever mlx-lm's own defaults.
Where modules differ in rank, the smaller are padded with zeros, and other scales are folded
into B; the function is the same. provenance.json says what it was trained on and how well.

Weights that were trained whole stand beside them under their own names (mlx-lm refuses such a
file; fuse it first); a "full" adapter holds nothing else.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlxlora.config import MAX_RANK
from mlxlora.errors import AdapterError
from mlxlora.files import atomic_directory, hash_file, save_tensors, write_json
from mlxlora.hub_files import here
from mlxlora.lora.card import card, whole_modules
from mlxlora.lora.provenance import COMPARED, is_a, mistold
from mlxlora.lora.targets import natural
from mlxlora.readers import FLOATING, read_json, safetensors_header

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
PROVENANCE = "provenance.json"
CARD = "README.md"
OF_A_RUN = "adapter"  # where a run's directory has its own
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FACTORS = ("lora_a", "lora_b")
TENSORS = (*FACTORS, "m")  # of a module
KINDS = ("lora", "dora", "full")
FORMAT = 1  # of provenance.json


@dataclass(frozen=True)
class Adapter:
    """weights: tensor name -> float32 array; method: "lora", "dora" or "full".

    rank and scale hold for every module (scale = alpha / rank); both are 0 for "full". What
    training began with (rsLoRA, PiSSA, ...) is in the tensors and the scale already.
    """

    method: str
    weights: Mapping[str, mx.array]
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    blocks: int = 0  # of the base, for mlx-lm's num_layers
    provenance: Mapping[str, Any] = field(default_factory=dict)
    home: Path | None = field(default=None, compare=False)  # the directory it was read from

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    @property
    def modules(self) -> list[str]:
        """Paths of the modules with low-rank factors, in order: a file's tensors have none."""
        split = (name.rpartition(".") for name in self.weights)
        return sorted({path for path, _, leaf in split if leaf in FACTORS}, key=natural)

    @property
    def whole(self) -> dict[str, mx.array]:
        """Weights that were trained whole, by the base's names."""
        low_rank = {f"{path}.{leaf}" for path in self.modules for leaf in TENSORS}
        names = sorted(self.weights.keys() - low_rank, key=natural)
        return {name: self.weights[name] for name in names}

    def tensors(self, path: str) -> dict[str, mx.array]:
        """A module's lora_a, lora_b and, of "dora", m."""
        named = ((leaf, self.weights.get(f"{path}.{leaf}")) for leaf in TENSORS)
        return {leaf: array for leaf, array in named if array is not None}

    @property
    def format(self) -> str:
        """Of the rows it was trained on: "chat", "completion", "text", or "" if unknown."""
        return str((self.provenance.get("data") or {}).get("format") or "")

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read an adapter's directory, ours or mlx-lm's, or fetch one by its Hub id.

        Raises AdapterError if a file is missing or damaged, if the weights are not those that
        provenance.json describes, or if a number in them is none (NaN, infinity).
        """
        directory = here(path, (CONFIG, WEIGHTS, PROVENANCE), AdapterError)
        if not os.path.lexists(directory / CONFIG):
            raise AdapterError(
                f"{directory} is not an adapter directory: no {CONFIG}{_instead(directory)}"
            )
        config = read_json(directory / CONFIG, AdapterError)
        file = directory / WEIGHTS
        if not os.path.lexists(file):
            raise AdapterError(f"{directory} has no {WEIGHTS}{_instead(directory)}")
        header = safetensors_header(file, AdapterError)
        provenance = {}
        if os.path.lexists(directory / PROVENANCE):
            provenance = read_json(directory / PROVENANCE, AdapterError)
            wrong = mistold(provenance)
            if wrong:
                raise AdapterError(f"{directory / PROVENANCE} is damaged: {wrong}")
            if provenance.get("weights_sha256") not in (None, hash_file(file)):
                raise AdapterError(
                    f"{file} is not the file that {PROVENANCE} describes (its hash differs); "
                    "it was changed or damaged after training"
                )
        check_numbers(file, header)
        weights = cast(dict[str, mx.array], mx.load(str(file)))
        adapter = cls._from_config(directory, config, weights, provenance)
        return dataclasses.replace(adapter, home=directory)

    @classmethod
    def _from_config(
        cls,
        directory: Path,
        config: dict[str, Any],
        weights: dict[str, mx.array],
        provenance: dict[str, Any],
    ) -> "Adapter":
        method = config.get("fine_tune_type", "lora")
        if method not in KINDS:
            raise AdapterError(
                f"{directory} is of type {str(method)[:40]!r}; known are {', '.join(KINDS)}"
            )
        if method == "full":
            return cls("full", weights, provenance=provenance)
        faults, numbers = _parameters(config)
        if faults:
            raise AdapterError(f"{directory / CONFIG} cannot be used: {'; '.join(faults)}")
        adapter = cls(method, weights, **numbers, provenance=provenance)
        wanted = {"lora": set(FACTORS), "dora": set(TENSORS)}[method]
        for path in adapter.modules:
            differing = wanted.symmetric_difference(adapter.tensors(path))
            if differing:
                raise AdapterError(
                    f"{directory / WEIGHTS}: {path[:80]}.{min(differing)} "
                    + ("is missing" if differing < wanted else f"is in no {method} adapter")
                )
        whole = config.get("modules_to_save") or []
        strange = [n for n in adapter.whole if n.rpartition(".")[0] not in whole]
        if strange or not weights:
            what = f"{strange[0][:80]!r}, not a" if strange else "no"
            raise AdapterError(f"{directory / WEIGHTS} holds {what} LoRA tensor")
        return adapter

    def save(self, path: str | Path, *, replace: bool = False) -> Path:
        """Write the directory, whole or not at all. Raises ExportError if it exists."""
        directory = Path(path)
        with atomic_directory(directory, replace=replace) as temporary:
            save_tensors(temporary / WEIGHTS, self.weights, {"format": "mlx"})
            write_json(temporary / CONFIG, self.config())
            record = {
                "format": FORMAT,
                **self.provenance,
                "weights_sha256": hash_file(temporary / WEIGHTS),
            }
            write_json(temporary / PROVENANCE, record)
            (temporary / CARD).write_text(
                card(dataclasses.replace(self, provenance=record)), "utf-8"
            )
        return directory

    def config(self) -> dict[str, Any]:
        """adapter_config.json: the keys mlx-lm reads, and alpha for the human eye."""
        if self.method == "full":
            return {"fine_tune_type": "full", "num_layers": self.blocks}
        whole = whole_modules(self)
        return {
            "fine_tune_type": self.method,
            "num_layers": self.blocks,
            **({"modules_to_save": whole} if whole else {}),
            "lora_parameters": {
                "rank": self.rank,
                "alpha": self.alpha,
                "scale": self.scale,
                "dropout": self.dropout,
                "keys": self.modules,
            },
        }


def differences(provenance: Mapping[str, Any], base: Mapping[str, str]) -> list[str]:
    """What sets the base at hand apart from the one the adapter was trained on.

    base is Identity.to_dict(). Names and revisions are not compared: the weights are what
    counts. Empty when the adapter says nothing of its base (one made by mlx-lm).
    """
    trained_on = provenance.get("base") or {}
    return [
        f"{label}: trained on {trained_on[key][:40]}, this base has {base[key][:40]}"
        for key, label in COMPARED.items()
        if trained_on.get(key) not in (None, base[key])
    ]


def _instead(directory: Path) -> str:
    """What may have been meant by a directory that is no adapter."""
    if not os.path.exists(directory):
        return " (it does not exist)"
    inside = directory / OF_A_RUN
    if os.path.lexists(inside / CONFIG):
        return f"; the one of this run is {inside}"
    if any(os.path.lexists(directory / name) for name in PEFT_WEIGHTS):
        return f"; it is PEFT's: mlxlora adapter import {directory} --model M --out A"
    return ""


def _parameters(config: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """(what is wrong with adapter_config.json, the numbers in it)."""
    own = config.get("lora_parameters")
    if not isinstance(own, dict) or not {"rank", "scale"} <= own.keys():
        return ["it has no lora_parameters.rank and .scale"], {}
    values = {
        "rank": own["rank"],
        "scale": own["scale"],
        "dropout": own.get("dropout") or 0.0,
        "blocks": config.get("num_layers") or 0,
    }
    limits: dict[str, tuple[type, float, float, str]] = {
        "rank": (int, 1, MAX_RANK, "a whole number from 1 to 65,536"),
        "scale": (float, -1e6, 1e6, "a number, at most a million"),
        "dropout": (float, 0, 1, "a number from 0 to 1"),
        "blocks": (int, -1, 1 << 31, "a whole number"),
    }
    faults = []
    whole = config.get("modules_to_save") or []
    if not (isinstance(whole, list) and all(isinstance(name, str) for name in whole)):
        faults.append("modules_to_save must be a list of names")
    for name, (kind, least, most, says) in limits.items():
        if not (is_a(values[name], kind) and least <= values[name] <= most):
            label = "num_layers" if name == "blocks" else f"lora_parameters.{name}"
            faults.append(f"{label} must be {says}, not {str(values[name])[:40]!r}")
        else:
            values[name] = kind(values[name])
    return faults, values


def check_numbers(file: Path, header: Mapping[str, Any]) -> None:
    """Raise AdapterError unless every tensor holds finite floating-point numbers.

    One that is not would make every answer of the model meaningless. Tensors are let go one by
    one, since those of a "full" adapter need not fit in memory together.
    """
    for name, info in header.items():
        if info["dtype"] not in FLOATING:
            raise AdapterError(f"{file}: {name[:80]!r} is of type {info['dtype']}, not floating")
    weights = cast(dict[str, mx.array], mx.load(str(file)))
    while weights:
        name, array = weights.popitem()
        if not mx.isfinite(array).all().item():
            raise AdapterError(
                f"{file}: {name[:80]!r} holds numbers that are none (NaN or infinity); "
                "training went wrong, use an earlier one"
            )
