"""Adapter: a trained adapter as a value, and its directory on disk.

The directory is one that mlx-lm loads as it is: adapters.safetensors with tensors named
<module>.lora_a / .lora_b, and adapter_config.json with one rank and one scale. Modules are
named by their full paths, so exactly these are adapted, whatever mlx-lm's own defaults.
Where modules differ in rank, the smaller are padded with zeros, and other scales are folded
into B; the function is the same. provenance.json says what it was trained on and how well.

A "full" adapter (every weight trained) holds whole weights under their own names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlxlora.errors import AdapterError, ModelError
from mlxlora.files import atomic_directory, hash_file, safetensors_header, save_tensors, write_json

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
PROVENANCE = "provenance.json"
FORMAT = 1  # of provenance.json


@dataclass(frozen=True)
class Adapter:
    """weights: tensor name -> float32 array; method: "lora" or "full".

    rank and scale hold for every module (scale = alpha / rank); both are 0 for "full".
    """

    method: str
    weights: Mapping[str, mx.array]
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    blocks: int = 0  # of the base, for mlx-lm's num_layers
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.weights))

    @property
    def format(self) -> str:
        """Of the rows it was trained on: "chat", "completion", "text", or "" if unknown."""
        return str(self.provenance.get("data", {}).get("format", ""))

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read an adapter directory, ours or mlx-lm's.

        Raises AdapterError if a file is missing or damaged, or if the weights are not those
        that provenance.json describes.
        """
        directory = Path(path).expanduser()
        config = _read_json(directory / CONFIG, directory)
        file = directory / WEIGHTS
        if not file.exists():
            raise AdapterError(f"{directory} has no {WEIGHTS}")
        try:
            safetensors_header(file)
        except ModelError as error:
            raise AdapterError(str(error)) from error
        provenance = {}
        if (directory / PROVENANCE).exists():
            provenance = _read_json(directory / PROVENANCE, directory)
            if provenance.get("weights_sha256") not in (None, hash_file(file)):
                raise AdapterError(
                    f"{file} is not the file that {PROVENANCE} describes (its hash differs); "
                    "it was changed or damaged after training"
                )
        weights = cast(dict[str, mx.array], mx.load(str(file)))
        return cls._from_config(directory, config, weights, provenance)

    @classmethod
    def _from_config(
        cls,
        directory: Path,
        config: dict[str, Any],
        weights: dict[str, mx.array],
        provenance: dict[str, Any],
    ) -> "Adapter":
        method = config.get("fine_tune_type", "lora")
        if method not in ("lora", "full"):
            raise AdapterError(f"{directory} is of type {method!r}; known are 'lora' and 'full'")
        if method == "full":
            return cls("full", weights, provenance=provenance)
        parameters = config.get("lora_parameters")
        parameters = parameters if isinstance(parameters, dict) else {}
        scale, rank = parameters.get("scale"), parameters.get("rank")
        if not isinstance(scale, int | float) or not isinstance(rank, int):
            raise AdapterError(f"{directory / CONFIG} has no lora_parameters.rank and .scale")
        strange = [n for n in weights if n.rpartition(".")[2] not in ("lora_a", "lora_b")]
        if strange:
            raise AdapterError(f"{directory / WEIGHTS} holds {strange[0]}, not a LoRA tensor")
        return cls(
            "lora",
            weights,
            rank,
            float(scale),
            float(parameters.get("dropout", 0.0)),
            int(config.get("num_layers", 0)),
            provenance,
        )

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
        return directory

    def facts(self) -> list[tuple[str, str]]:
        """What a person wants to know of it: label and value."""
        told = self.provenance
        base, metrics = told.get("base", {}), told.get("metrics", {})
        facts = [("method", self.method), ("layers", f"{len(self.modules)}")]
        if self.method == "lora":
            facts.append(("rank", f"{self.rank}, alpha {self.alpha:g} (scale {self.scale:g})"))
        parameters = sum(array.size for array in self.weights.values())
        facts.append(("parameters", f"{parameters:,}"))
        if base:
            facts.append(("base", f"{base['name']} ({base['quantization']})"))
        for name, file in told.get("data", {}).get("files", {}).items():
            facts.append((f"{name} rows", f"{file['rows']:,} {self.format} in {file['path']}"))
        if metrics:
            facts.append(("update", f"{metrics['update']} of {metrics['updates']}"))
            before, after = metrics.get("valid_loss_before"), metrics.get("valid_loss")
            if before is not None and after is not None:
                facts.append(("validation loss", f"{before:.4f} before, {after:.4f} after"))
        facts += [(name, text) for name, text in told.get("versions", {}).items()]
        if not told:
            facts.append(("provenance", "none (not written by mlxlora)"))
        return facts

    def config(self) -> dict[str, Any]:
        """adapter_config.json: the keys mlx-lm reads, and alpha for the human eye."""
        if self.method == "full":
            return {"fine_tune_type": "full", "num_layers": self.blocks}
        return {
            "fine_tune_type": "lora",
            "num_layers": self.blocks,
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
    trained_on = provenance.get("base", {})
    labels = {
        "fingerprint": "weights",
        "quantization": "quantization",
        "template": "chat template",
    }
    return [
        f"{label}: trained on {trained_on[key][:40]}, this base has {base[key][:40]}"
        for key, label in labels.items()
        if key in trained_on and trained_on[key] != base[key]
    ]


def _read_json(path: Path, directory: Path) -> dict[str, Any]:
    if not path.exists():
        hint = " (it does not exist)" if not directory.exists() else ""
        raise AdapterError(f"{directory} is not an adapter directory: no {path.name}{hint}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} does not hold a JSON object")
    return value
