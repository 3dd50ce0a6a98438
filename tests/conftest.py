"""Tiny models with a byte tokenizer, made here: no network, no weights from elsewhere."""

import json
import shutil
from pathlib import Path

import mlxlora  # noqa: F401  (loads OpenBLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import pytest
from go_engine import go  # noqa: F401  (a fixture)
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3, qwen3_moe
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlxlora.base import Base, load
from mlxlora.export.quantize import quantize

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DENSE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 258,
}
EXPERTS = {
    **DENSE,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
FAMILIES = {"qwen3": qwen3, "qwen3_moe": qwen3_moe}


def write_tokenizer(directory: Path, template: str | None = CHATML) -> None:
    """A byte tokenizer: token i < 256 is a byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)


def write_model(directory: Path, config: dict, template: str | None = CHATML) -> Path:
    """A random model of this config, float32, in a directory that mlx-lm loads."""
    directory.mkdir(parents=True)
    family = FAMILIES[config["model_type"]]
    mx.random.seed(7)
    model = family.Model(family.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    for name, array in weights.items():
        if array.ndim > 1:  # larger than at birth, so that layers matter
            weights[name] = mx.random.normal(array.shape) * 0.1
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory, template)
    return directory


@pytest.fixture(scope="session")
def dense_path(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "dense", DENSE)


@pytest.fixture(scope="session")
def quantized_path(dense_path) -> Path:
    out = dense_path.parent / "dense-4bit"
    quantize(dense_path, out, bits=4, group_size=32)
    return out


@pytest.fixture(scope="session")
def experts_path(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "experts", EXPERTS)


@pytest.fixture
def dense(dense_path) -> Base:
    return load(dense_path)


@pytest.fixture
def quantized(quantized_path) -> Base:
    return load(quantized_path)


@pytest.fixture
def experts(experts_path) -> Base:
    return load(experts_path)


@pytest.fixture
def broken(dense_path, tmp_path) -> Path:
    """A copy of the dense model to break."""
    return shutil.copytree(dense_path, tmp_path / "broken")


@pytest.fixture
def rows(tmp_path) -> Path:
    """A directory of 40 training rows and 8 validation rows: answer with the first letter."""
    directory = tmp_path / "rows"
    directory.mkdir()
    words = ["apple", "bread", "cloud", "drum", "eagle", "flame", "grape", "horse"]
    for name, count in (("train", 40), ("valid", 8)):
        lines = [
            json.dumps(
                {"prompt": f"{words[i % 8]} {i}", "completion": words[i % 8][0] * (1 + i % 5)}
            )
            for i in range(count)
        ]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def randomized(model: nn.Module, seed: int = 3) -> None:
    """Move every lora_b of an attached model, so that the adapter does something."""
    from mlxlora.lora.attach import low_rank_layers

    for number, (_, layer) in enumerate(low_rank_layers(model)):
        key = mx.random.key(seed * 1000 + number)
        layer.lora_b = layer.lora_b + 0.1 * mx.random.normal(layer.lora_b.shape, key=key)


def worst(a: mx.array, b: mx.array) -> float:
    """Largest difference relative to the largest value."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-9)).item()
