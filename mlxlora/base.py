"""Base(model, tokenizer, config, identity): the frozen model, and the only door to mlx-lm's zoo.

A directory is checked before a byte of it is loaded (config, shards, truncation, known
type), so that what is wrong is said in one sentence. Names that are no directory are
fetched through huggingface-hub. No code from a model directory runs unless asked for.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils as zoo

from mlxlora.errors import ModelError
from mlxlora.files import fingerprint, hash_text, safetensors_header
from mlxlora.machine import compute_dtype
from mlxlora.quantized import QUANTIZED, use_own_products

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Identity:
    """What makes a base this base: an adapter remembers it and checks it."""

    name: str  # as the user gave it: a path or a Hub id
    revision: str  # the Hub's commit, or ""
    fingerprint: str  # of the weights on disk (files.fingerprint)
    quantization: str  # "none" or e.g. "4 bits, groups of 64, affine"
    template: str  # hash of the chat template, or "none"

    def to_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Base:
    """A loaded base model. Nothing here trains or writes it; adapters attach to .model."""

    model: nn.Module
    tokenizer: Any  # mlx_lm's TokenizerWrapper
    config: dict[str, Any]
    path: Path
    identity: Identity

    @property
    def parameters(self) -> int:
        """Number of weights, packed ones counted as if they were not."""
        total = 0
        for module in self.model.modules():
            own = {k: v for k, v in module.items() if isinstance(v, mx.array)}
            if isinstance(module, QUANTIZED):
                total += own["weight"].size * 32 // module.bits
                own = {"bias": own["bias"]} if "bias" in own else {}
            total += sum(v.size for v in own.values())
        return total


def load(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Base:
    """Load a base model and its tokenizer from a directory or the Hub.

    Raises ModelError naming what is missing or damaged. On the CPU the floating-point
    weights are widened to float32 (machine.compute_dtype).
    """
    path, commit = find(name, revision)
    check_directory(path)
    model, config = open_model(path, trust_remote_code=trust_remote_code)
    dtype = compute_dtype()
    if dtype is not None:
        model.set_dtype(dtype)
    use_own_products(model)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    tokenizer = open_tokenizer(path, config, trust_remote_code)
    return Base(model, tokenizer, config, path, identify(str(name), path, commit))


def find(name: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """The local directory of a model and its Hub commit ("" for a plain directory)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path, ""
    if path.exists():
        raise ModelError(f"{path} is a file; --model wants the model's directory or a Hub id")
    if not HUB_ID.fullmatch(str(name)):
        raise ModelError(f"no model directory {name} (a Hub id looks like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            str(name), revision=revision, allow_patterns=zoo.DEFAULT_ALLOW_PATTERNS
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} is neither a directory here nor to be had from the Hub: {reason}"
        ) from error
    return Path(found), Path(found).name


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("model*.safetensors"))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises ModelError if missing or not JSON."""
    file = path / "config.json"
    if not file.exists():
        raise ModelError(f"{path} has no config.json, so it is not a model directory")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} names no model_type")
    return config


def check_directory(path: Path) -> None:
    """Raise ModelError unless config, every listed shard and every byte of it are there."""
    read_config(path)
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is damaged; download the model again") from error
        missing = sorted(name for name in listed if not (path / str(name)).exists())
        if missing:
            raise ModelError(f"{path} lacks {len(missing)} shard(s): {', '.join(missing)}")
    files = weight_files(path)
    if not files:
        raise ModelError(f"{path} has no model*.safetensors; mlxlora reads no other weights")
    for file in files:
        safetensors_header(file)


def open_model(
    path: Path, *, lazy: bool = True, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model for this directory with lazily loaded weights, and its config.

    Raises ModelError for an unknown model type, remote code not allowed, or tensors
    that do not fit the config.
    """
    config = read_config(path)
    try:
        model, loaded = zoo.load_model(path, lazy=lazy, trust_remote_code=trust_remote_code)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise ModelError(_why_not_loaded(path, config, e)) from e
    return model, loaded


def open_tokenizer(path: Path, config: dict[str, Any], trust_remote_code: bool = False) -> Any:
    """mlx-lm's tokenizer for this directory. Raises ModelError if there is none.

    The special token with which the chat template closes the assistant's turn is a stop
    token too: base models often name only the one that ends a text.
    """
    try:
        tokenizer = zoo.load_tokenizer(
            path,
            {"trust_remote_code": trust_remote_code},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:  # tokenizer classes of every kind raise what they like
        raise ModelError(f"the tokenizer in {path} does not load: {error}") from error
    closing = _turn_end(tokenizer)
    if closing is not None:
        tokenizer.add_eos_token(closing)
    return tokenizer


def _turn_end(tokenizer: Any) -> str | None:
    """The special token right after an assistant's words in the chat template, if any."""
    if not tokenizer.has_chat_template:
        return None
    words = "zq"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": words}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template that wants something else; rendering rows will say so
        return None
    rest = text.rpartition(words)[2].lstrip()
    special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    added = [str(token) for token in tokenizer.get_added_vocab()]
    return next((t for t in [*special, *added] if rest.startswith(t)), None)


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
    )


def describe_quantization(quantization: dict[str, Any] | None) -> str:
    if not quantization or "bits" not in quantization:
        return quantization.get("quant_method", "none") if quantization else "none"
    mode = quantization.get("mode", "affine")
    return f"{quantization['bits']} bits, groups of {quantization['group_size']}, {mode}"


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """model.train() inside, model.eval() after."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def trainable_size(model: nn.Module) -> int:
    return sum(v.size for _, v in tree_flatten(model.trainable_parameters()))


def _why_not_loaded(path: Path, config: dict[str, Any], error: Exception) -> str:
    kind, text = config["model_type"], str(error)
    if "not supported" in text:
        return f"{path} is of type {kind!r}, which mlx-lm {_version()} does not know"
    if "trust_remote_code" in text:
        return (
            f"{path} wants to run its own Python ({config.get('model_file')}); "
            "read that file, then pass --trust-remote-code if you trust it"
        )
    return f"the weights in {path} do not fit its config.json ({kind}): {text[:400]}"


def _version() -> str:
    from importlib.metadata import version

    return version("mlx-lm")


def _template_hash(path: Path) -> str:
    jinja = path / "chat_template.jinja"
    if jinja.exists():
        return hash_text(jinja.read_text(encoding="utf-8"))[:16]
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            template = json.loads((path / name).read_text(encoding="utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError):
            continue
        if template:
            return hash_text(json.dumps(template))[:16]
    return "none"
