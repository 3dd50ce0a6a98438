"""Base(model, tokenizer, config, identity): the frozen model, and the only door to mlx-lm's zoo.

No code from a model directory runs unless asked for: its Python only with trust_remote_code,
pickled weights never. A chat template is a program too; transformers runs it in Jinja's
sandbox, which reaches nothing outside and refuses ranges above 100,000, but may take its time:
Ctrl-C ends it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import utils as zoo

from mlxlora.errors import DataError, ModelError
from mlxlora.machine import compute_dtype
from mlxlora.model_files import Identity, check_directory, find, identify, read_config
from mlxlora.quantized import QUANTIZED, use_own_products

# Language models that mlx-lm knows under the name alone of the model, which also sees, around them.
SHELLS = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}


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
    base = open_base(name, revision=revision, trust_remote_code=trust_remote_code)
    mx.eval(base.model.parameters())
    tokenizer = open_tokenizer(base.path, base.config, trust_remote_code)
    tokenizer._vocabulary = _try_out(base.path, base.model)
    return replace(base, tokenizer=tokenizer)


def open_base(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Base:
    """The base without a tokenizer, each weight read when it is asked for. Raises ModelError."""
    path, commit = find(name, revision)
    model, config = open_frozen(path, trust_remote_code)
    return Base(model, None, config, path, identify(str(name), path, commit))


def open_frozen(path: Path, trust_remote_code: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The checked model of a directory as a base is used, its weights not read yet; its config."""
    check_directory(path)
    model, config = open_model(path, trust_remote_code=trust_remote_code)
    dtype = compute_dtype()
    if dtype is not None:
        model.set_dtype(dtype)
    use_own_products(model)
    model.freeze()
    model.eval()
    return model, config


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
    kind = config["model_type"]
    model_class, arguments_class = zoo._get_classes(
        {**config, "model_type": SHELLS.get(kind, kind)}
    )

    def build(arguments: Any) -> nn.Module:
        model: nn.Module = model_class(arguments)
        if not hasattr(model, "_no_grad"):
            nn.Module.__init__(model)  # some classes never do, and cannot be frozen then
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
    closing = turn_end(tokenizer)
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


def turn_end(tokenizer: Any) -> str | None:
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
