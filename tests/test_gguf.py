"""GGUF files in llama.cpp, beside the logits of MLX's base with the adapter attached.

`python -m pytest -s tests/test_gguf.py` prints the largest differences, by family.
"""

import json
from pathlib import Path

import architectures
import mlx.core as mx
import numpy as np
import pytest
from conftest import randomized, write_tokenizer

from mlxlora.base import load
from mlxlora.config import LoraConfig
from mlxlora.errors import ExportError
from mlxlora.export import gguf
from mlxlora.export.quantize import quantize
from mlxlora.lora.fresh import collect, new_layers

llama_cpp = pytest.importorskip("llama_cpp")
import llama  # noqa: E402

pytestmark = [pytest.mark.llama, pytest.mark.filterwarnings("ignore")]

TOKENS = [1, 5, 200, 33, 7, 90, 12, 250, 3, 4, 8, 100, 101, 44, 45, 46, 47, 48, 49, 50]
# what is tried -> (family, what is not as in architectures.py)
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
}
DIFFERENCES: dict[str, dict[str, float]] = {}  # case -> type -> largest difference


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    kinds = ("f32", "f16", "q8_0", "from 4 bits")
    print("\n" + " " * 28 + "".join(f"{kind:>13}" for kind in kinds))
    for name, found in DIFFERENCES.items():
        cells = [f"{found[kind]:.1e}" if kind in found else "" for kind in kinds]
        print(f"{name:28}" + "".join(f"{cell:>13}" for cell in cells))


def write_base(directory: Path, family: str, **changes) -> Path:
    """A tiny model of the family with the byte tokenizer."""
    changes = {"vocab_size": 259, "eos_token_id": 258, **changes}
    architectures.write_model(directory, family, **changes)
    write_tokenizer(directory)
    return directory


def adapted(path: Path, **lora):
    """(adapter, the logits of base + adapter, (token, vocabulary))."""
    base = load(path)
    config = LoraConfig(rank=4, alpha=8.0, **lora)
    plain = our_logits(base)
    new_layers(base.model, config, 0)
    randomized(base.model)
    adapter = collect(base.model, config, {"base": base.identity.to_dict()})
    ours = our_logits(base)
    assert difference(plain, ours) > 0.03  # or nothing would be shown
    return adapter, ours


def our_logits(base) -> np.ndarray:
    return np.array(base.model(mx.array([TOKENS]))[0].astype(mx.float32))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest, relative to the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_base_and_adapter(name, tmp_path):
    family, changes = CASES[name]
    path = write_base(tmp_path / "base", family, **changes)
    adapter, ours = adapted(path)
    for quant in ("f32", "f16", "q8_0"):
        out = tmp_path / f"{quant}.gguf"
        gguf.write(path, adapter, out, quant)
        DIFFERENCES.setdefault(name, {})[quant] = difference(ours, llama.logits(out, TOKENS))
    assert DIFFERENCES[name]["f32"] < 1e-4
    assert DIFFERENCES[name]["f16"] < 5e-3
    assert DIFFERENCES[name]["q8_0"] < 0.1
