"""A model's directory before anything of it is loaded: where it is, whether it is whole.

It is checked first (config, shards, truncation), so that what is wrong is said in one sentence.
Names that are no directory are fetched through huggingface-hub. What makes a model this model
is told from its files alone.
"""

import dataclasses
import glob
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora.errors import ModelError
from mlxlora.files import hash_file, hash_text
from mlxlora.hub_files import HUB_ID, fetch
from mlxlora.readers import expanded, fingerprint, read_json, read_text, safetensors_header

INDEX = "model.safetensors.index.json"
# Names that families give to the number of their blocks.
BLOCK_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


@dataclass(frozen=True)
class Identity:
    """What makes a base this base: an adapter remembers it and checks it."""

    name: str  # as the user gave it: a path or a Hub id
    revision: str  # the Hub's commit, or ""
    fingerprint: str  # of the weights on disk (readers.fingerprint)
    quantization: str  # "none" or e.g. "4 bits, groups of 64, affine"
    template: str  # hash of the chat template, or "none"
    tokenizer: str = "none"  # hash of the tokenizer's files

    @property
    def public_name(self) -> str:
        """The Hub id or, of a directory, its own name: nothing of where it is."""
        return self.name if self.revision else Path(self.name).name

    def to_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def find(name: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """The local directory of a model and its Hub commit ("" for a plain directory)."""
    path = expanded(name)
    if os.path.isdir(path):
        return path, ""
    if os.path.exists(path):
        raise ModelError(f"{path} is a file; --model wants the model's directory or a Hub id")
    if not HUB_ID.fullmatch(str(name)):
        raise ModelError(f"no model directory {name} (a Hub id looks like owner/name)")
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    found = fetch(str(name), revision, DEFAULT_ALLOW_PATTERNS, ModelError)
    return found, found.name


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("model*.safetensors"))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises ModelError if missing or not JSON."""
    file = path / "config.json"
    if not os.path.lexists(file):
        raise ModelError(f"{path} has no config.json, so it is not a model directory")
    config = read_json(file, ModelError)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} names no model_type")
    text = config.get("text_config")
    if not isinstance(text or {}, dict):
        raise ModelError(f"{file}: text_config must be an object")
    for key in ("quantization", "quantization_config"):
        for settings in (config.get(key), (text or {}).get(key)):
            if not isinstance(settings or {}, dict):
                raise ModelError(f"{file}: {key} must be an object")
            _check_quantization(file, settings or {})
    return config


def _check_quantization(file: Path, settings: dict[str, Any]) -> None:
    """Raise ModelError for numbers that MLX would divide by, or count in 32 bits, unchecked.

    settings hold those of all layers, and objects with those of single layers.
    """
    for own in (settings, *(v for v in settings.values() if isinstance(v, dict))):
        for name, most in (("bits", 32), ("group_size", 1 << 16)):
            value = own.get(name, 1)
            if not (type(value) is int and 1 <= value <= most):
                raise ModelError(f"{file}: {name} of a quantization cannot be {str(value)[:40]!r}")


def check_directory(path: Path) -> None:
    """Raise ModelError unless config, every listed shard and every byte of it are there."""
    config = read_config(path)
    if glob.escape(str(path)) != str(path):
        raise ModelError(f"mlx-lm cannot read a directory with one of [ * ? in its path: {path}")
    _check_kinds(path)
    _check_index(path)
    files = weight_files(path)
    if not files:
        raise ModelError(f"{path} has no model*.safetensors; mlxlora reads no other weights")
    tensors = sum(len(safetensors_header(file)) for file in files)
    for key in BLOCK_COUNTS:
        for count in (config.get(key), (config.get("text_config") or {}).get(key)):
            if isinstance(count, int) and count > tensors:
                raise ModelError(
                    f"{path}: config.json says {key} = {str(count)[:20]}, but there are only "
                    f"{tensors:,} tensors; they do not belong together"
                )


def _check_kinds(path: Path) -> None:
    """Raise ModelError for a pipe or device in the directory: whoever opens it waits for ever."""
    for entry in path.iterdir():
        try:
            mode = entry.stat().st_mode
        except OSError:  # a link to nothing, as good as absent
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ModelError(f"{entry} is neither a file nor a directory; remove it")


def _check_index(path: Path) -> None:
    """Raise ModelError if a shard that the index lists is missing, or not of this directory."""
    index = path / INDEX
    if not os.path.lexists(index):
        return
    listed = read_json(index, ModelError).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(n, str) for n in listed.values()):
        raise ModelError(f"{index} is damaged; download the model again")
    names = sorted(set(listed.values()))
    outside = [name for name in names if name != os.path.basename(name) or name == ".."]
    if outside:
        raise ModelError(f"{index} lists {outside[0][:80]!r}, which is not in {path}")
    missing = [name for name in names if not os.path.isfile(path / name)]
    if missing:
        shown = ", ".join(name[:80] for name in missing[:5])
        raise ModelError(f"{path} lacks {len(missing)} shard(s): {shown}")


def identify(name: str, path: Path, commit: str = "") -> Identity:
    """The identity of the model in this directory."""
    config = read_config(path)
    quantization = config.get("quantization") or config.get("quantization_config")
    return Identity(
        name=name,
        revision=commit,
        fingerprint=fingerprint(weight_files(path)),
        quantization=describe_quantization(quantization),
        template=_template_hash(path),
        tokenizer=_tokenizer_hash(path),
    )


def describe_quantization(quantization: dict[str, Any] | None) -> str:
    if not quantization or "bits" not in quantization:
        return str((quantization or {}).get("quant_method", "none"))
    mode = quantization.get("mode", "affine")
    return f"{quantization['bits']} bits, groups of {quantization.get('group_size')}, {mode}"


def _tokenizer_hash(path: Path) -> str:
    """Of what turns text into tokens: the first of these files that there is."""
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"):
        if os.path.isfile(path / name):
            return hash_file(path / name)[:16]
    found = sorted(path.glob("*.tiktoken"))
    return hash_file(found[0])[:16] if found else "none"


def _template_hash(path: Path) -> str:
    jinja = path / "chat_template.jinja"
    if os.path.exists(jinja):
        return hash_text(read_text(jinja, ModelError))[:16]
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not os.path.exists(path / name):
            continue
        template = read_json(path / name, ModelError).get("chat_template")
        if template:
            return hash_text(json.dumps(template))[:16]
    return "none"
