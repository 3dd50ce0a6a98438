"""Base(model, tokenizer, config, identity): the frozen model, and the only door to mlx-lm's zoo.

A directory is checked before a byte of it is loaded (config, shards, truncation, known
type), so that what is wrong is said in one sentence. Names that are no directory are
fetched through huggingface-hub. No code from a model directory runs unless asked for: its
Python only with trust_remote_code, pickled weights never. A chat template is a program too;
transformers runs it in Jinja's sandbox, which reaches nothing outside and refuses ranges above
100,000, but may take its time: Ctrl-C ends it.
"""

import dataclasses
import glob
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import utils as zoo

from mlxlora.errors import DataError, ModelError
from mlxlora.files import hash_text
from mlxlora.machine import compute_dtype
from mlxlora.quantized import QUANTIZED, use_own_products
from mlxlora.readers import expanded, fingerprint, read_json, read_text, safetensors_header

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
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
    tokenizer._vocabulary = _try_out(path, model)
    return Base(model, tokenizer, config, path, identify(str(name), path, commit))


def find(name: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """The local directory of a model and its Hub commit ("" for a plain directory)."""
    path = expanded(name)
    if os.path.isdir(path):
        return path, ""
    if os.path.exists(path):
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


def open_model(
    path: Path, *, lazy: bool = True, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model for this directory with lazily loaded weights, and its config.

    Raises ModelError for an unknown model type, remote code not allowed, or tensors
    that do not fit the config.
    """
    config = read_config(path)
    try:
        model, loaded = zoo.load_model(
            path, lazy=lazy, trust_remote_code=trust_remote_code, get_model_classes=_guarded_classes
        )
        vars(model).pop("sanitize", None)
    except Exception as error:  # sixty families of models raise what they like
        raise ModelError(_why_not_loaded(path, config, error)) from error
    _check_types(path, model)
    return model, loaded


def _guarded_classes(config: dict[str, Any]) -> tuple[Callable[..., nn.Module], type]:
    """mlx-lm's classes for this config; their models look at quantized weights before it does.

    It divides their widths by each other to find the size of a group, and where the config
    promises narrower layers, that is 0, by which MLX then divides: the end of the process.
    """
    model_class, arguments_class = zoo._get_classes(config)

    def build(arguments: Any) -> nn.Module:
        model: nn.Module = model_class(arguments)
        own = getattr(model, "sanitize", lambda weights: weights)

        def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
            weights = own(weights)
            for path, module in model.named_modules():
                if f"{path}.scales" in weights and "weight" in module:
                    width, groups = module.weight.shape[-1], weights[f"{path}.scales"].shape[-1]
                    if not 1 <= groups <= width or 32 * weights[f"{path}.weight"].shape[-1] < width:
                        raise ValueError(f"{path} is {width} wide, its weight has {groups} groups")
            return weights

        model.sanitize = sanitize
        return model

    return build, arguments_class


def _check_types(path: Path, model: nn.Module) -> None:
    """Raise ModelError if a weight is of a type that its layer cannot compute with.

    mlx-lm compares names and shapes alone.
    """
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZED):
            fits = module.weight.dtype == mx.uint32
        elif isinstance(module, nn.Linear | nn.Embedding | nn.RMSNorm | nn.LayerNorm):
            fits = "weight" not in module or mx.issubdtype(module.weight.dtype, mx.floating)
        else:
            continue
        if not fits:
            raise ModelError(f"{path}: {name}.weight holds numbers of type {module.weight.dtype}")


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
        tokenizer.decode(tokenizer.encode("a")), len(tokenizer)
        ends = tokenizer.eos_token_ids
        if not all(isinstance(i, int) and 0 <= i < 1 << 31 for i in ends):
            raise ValueError(f"there is no token for eos_token_id {ends!r}")
    except Exception as error:  # tokenizer classes of every kind raise what they like
        reason = str(error)[:400]
        raise ModelError(f"the tokenizer in {path} does not load: {reason}") from error
    closing = _turn_end(tokenizer)
    if closing is not None:
        tokenizer.add_eos_token(closing)
    return tokenizer


def check_tokens(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> None:
    """Raise DataError for a token that the model has no embedding of: MLX reads past its end.

    Some tokenizers know tokens, mostly padding, that their models were not made for.
    """
    known = getattr(tokenizer, "_vocabulary", None)
    largest = int(np.max(tokens)) if len(tokens) else 0
    if known is not None and largest >= known:
        raise DataError(
            f"the tokenizer gives token {largest} ({tokenizer.decode([largest])!r}), but the "
            f"model has only {known:,}; leave that out, or mend the model's tokenizer"
        )


def _try_out(path: Path, model: nn.Module) -> int:
    """Compute one token, so that a config that lies is found now; return the vocabulary's size."""
    try:
        logits = model(mx.zeros((1, 1), mx.int32))
        mx.eval(logits)
        return int(logits.shape[-1])
    except Exception as error:  # sixty families of models raise what they like
        raise ModelError(f"the model in {path} does not compute: {str(error)[:400]}") from error


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
        return str((quantization or {}).get("quant_method", "none"))
    mode = quantization.get("mode", "affine")
    return f"{quantization['bits']} bits, groups of {quantization.get('group_size')}, {mode}"


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
    if os.path.exists(jinja):
        return hash_text(read_text(jinja, ModelError))[:16]
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not os.path.exists(path / name):
            continue
        template = read_json(path / name, ModelError).get("chat_template")
        if template:
            return hash_text(json.dumps(template))[:16]
    return "none"
