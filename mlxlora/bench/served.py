"""What both servers are given: a model's directory of random weights, and adapters that differ.

A published shape says how fast a model is, but a server also needs a tokenizer, a chat template
and an end. The tokenizer knows printable ASCII, and a word of letters for every other number, so
that each token is text at once and none is held back. The end token's row of the head is zeros:
the largest of many random logits is above 0, so greedy answers run to the length asked for.
"""

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxlora.base import open_model
from mlxlora.bench.job import Model
from mlxlora.bench.shapes import GROUP_SIZE, SHAPES, build, dtype_of, weight_count
from mlxlora.config import LoraConfig
from mlxlora.files import save_tensors, write_json
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import detach, low_rank_layers
from mlxlora.lora.fresh import collect, new_layers, random_key
from mlxlora.model_files import check_directory, find

ADAPTERS = ("a", "b", "c", "d")  # by the names they are served under
SCALE = 2.0  # alpha / rank
TRAINED = 0.05  # spread of lora_b: enough for answers to differ
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = SPECIAL.index("<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Given:
    """What a server serves."""

    model: Path
    adapters: Mapping[str, Path]  # name -> directory


def prepare(model: str, shape: str, bits: int, rank: int, directory: Path) -> tuple[Given, Model]:
    """Write what is to be served into the directory: model is a directory or Hub id, or "" for
    the shape with random weights. Raises ModelError for a model that cannot be loaded.
    """
    path = directory / "model"
    if model:
        path, _ = find(model)
        check_directory(path)
    else:
        write_model(shape, bits, path)
    opened, config = open_model(path)
    about = Model(
        name=path.name if model else shape,
        weights=weight_count(opened),
        dtype=str(dtype_of(opened)).rpartition(".")[2],
        bits=(config.get("quantization") or {}).get("bits", 0),
        device=str(mx.device_info().get("device_name", mx.default_device())),
    )
    adapters = {
        name: _adapter(opened, rank, number).save(directory / name)
        for number, name in enumerate(ADAPTERS)
    }
    return Given(path, adapters), about


def write_model(shape: str, bits: int, directory: Path) -> None:
    """The shape of SHAPES with random weights, float32 on the CPU, else bfloat16.

    bits: 0, or the width that linear layers and the embedding are quantized to.
    """
    directory.mkdir(parents=True)
    config = {**SHAPES[shape], "eos_token_id": END}
    if bits:
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": bits}
    weights = dict(tree_flatten(build(SHAPES[shape], bits).parameters()))
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    for name in ("weight", "scales", "biases"):
        if f"{head}.{name}" in weights:
            weights[f"{head}.{name}"][END] = 0
    save_tensors(directory / "model.safetensors", weights, {"format": "mlx"})
    write_json(directory / "config.json", config)
    _write_tokenizer(directory, config["vocab_size"])


def _adapter(model: nn.Module, rank: int, number: int) -> Adapter:
    """One that stands for a trained one: its B is not zero."""
    config = LoraConfig(rank=rank, alpha=SCALE * rank)
    new_layers(model, config, seed=number)
    for place, (_, layer) in enumerate(low_rank_layers(model)):
        drawn = mx.random.normal(layer.lora_b.shape, key=random_key(number, place, 1))
        layer.lora_b = TRAINED * drawn
    adapter = collect(model, config, {})
    mx.eval(dict(adapter.weights))
    detach(model)
    return adapter


def _write_tokenizer(directory: Path, words: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(words), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _vocabulary(words: int) -> dict[str, int]:
    """Text -> token: the special ones, printable ASCII, then words as letters count: ba, bb, ...

    A space and a line's end are written as byte-level tokenizers write them.
    """
    visible = string.ascii_letters + string.digits + string.punctuation
    texts = [*SPECIAL, *visible, "\u0120", "\u010a"]
    texts += (_spelled(number) for number in range(26, 26 + words - len(texts)))
    return {text: number for number, text in enumerate(texts)}


def _spelled(number: int) -> str:
    """A number in letters; from 26 on, at least two."""
    text = ""
    while number:
        number, digit = divmod(number, 26)
        text = string.ascii_lowercase[digit] + text
    return text
