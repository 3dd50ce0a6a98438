"""What each recipe needs at least, counted on its model's published shape: the recipes' headers.

    python recipes/predict.py            print them
    python recipes/predict.py --write    put them into the headers and into recipes/README.md

No model is downloaded. A directory is made that has what a plan reads of one: config.json, and
weight files of the right header whose data is a hole. Counted is by mlxlora.plan: the base, the
adapter with gradients and optimizer, and the activations of one row of data.max_length tokens.
`mlxlora plan` measures a few blocks besides, which takes minutes at these widths on a CPU.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlxlora  # noqa: F401  (loads OpenBLAS before anything imports mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3, qwen3_moe

from mlxlora.config import RunConfig
from mlxlora.lora.fresh import prepare
from mlxlora.memory import parse_size
from mlxlora.plan import plan_memory
from mlxlora.skeleton import open_skeleton, write_stand_in
from mlxlora.train.forecast import gigabytes
from mlxlora.train.recompute import trained_blocks

HERE = Path(__file__).parent
RECIPES = sorted(HERE.glob("*.toml"))
FAMILIES: dict[str, Any] = {"llama": llama, "qwen3": qwen3, "qwen3_moe": qwen3_moe}
QUANTIZATION = {"group_size": 64, "bits": 4}
PREDICTION = re.compile(r"^# Memory: from (?P<said>.*?) of (?P<budget>[\d.]+ GB)", re.MULTILINE)


def _shape(kind: str, hidden: int, blocks: int, mlp: int, heads: int, kv: int) -> dict[str, Any]:
    words = {"llama": 128_256}.get(kind, 151_936)
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 128,
        "vocab_size": words,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
    }


TIED = {"tie_word_embeddings": True}
EXPERTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
# Model of a recipe -> the shape that was published.
SHAPES: dict[str, dict[str, Any]] = {
    "mlx-community/Qwen3-0.6B-4bit": {**_shape("qwen3", 1024, 28, 3072, 16, 8), **TIED},
    "mlx-community/Qwen3-0.6B-Base-4bit": {**_shape("qwen3", 1024, 28, 3072, 16, 8), **TIED},
    "mlx-community/Qwen3-4B-Instruct-2507-4bit": {
        **_shape("qwen3", 2560, 36, 9728, 32, 8),
        **TIED,
    },
    "mlx-community/Llama-3.2-1B-Instruct-4bit": {
        **_shape("llama", 2048, 16, 8192, 32, 8),
        **TIED,
        "head_dim": 64,
    },
    "mlx-community/Llama-3.2-3B-Instruct-4bit": {
        **_shape("llama", 3072, 28, 8192, 24, 8),
        **TIED,
    },
    "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit": _shape("llama", 4096, 32, 14_336, 32, 8),
    "mlx-community/Qwen3-32B-4bit": _shape("qwen3", 5120, 64, 25_600, 64, 8),
    "mlx-community/Qwen3-30B-A3B-4bit": {
        **_shape("qwen3_moe", 2048, 48, 6144, 32, 4),
        **EXPERTS,
    },
}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The same kind of model, of two narrow blocks and few words: planned in a second."""
    narrow = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "head_dim": 32}
    few = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return config | narrow | few | {k: v for k, v in experts.items() if k in config}


def write_shape(directory: Path, config: dict[str, Any]) -> Path:
    """A model directory of this shape, quantized to 4 bits, without a weight in it."""
    directory.mkdir(parents=True)
    family = FAMILIES[config["model_type"]]
    model = family.Model(family.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    nn.quantize(
        model,
        **QUANTIZATION,
        class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 64 == 0,
    )
    tensors, place = {}, 0
    for name, array in tree_flatten(model.parameters()):  # never evaluated
        dtype = {mx.bfloat16: "BF16", mx.uint32: "U32"}[array.dtype]
        tensors[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    write_stand_in(directory / "model.safetensors", tensors)
    described = {**config, "quantization": QUANTIZATION, "quantization_config": QUANTIZATION}
    (directory / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return directory


@contextmanager
def planned(run: RunConfig, config: dict[str, Any]) -> Iterator[RunConfig]:
    """The run, on a directory of this shape that is there inside."""
    with tempfile.TemporaryDirectory() as place:
        model = write_shape(Path(place) / "model", config)
        yield replace(run, model=str(model))


def count(run: RunConfig, config: dict[str, Any], budget: int) -> tuple[int, bool]:
    """(bytes that the run holds, a row at a time; are blocks computed again)."""
    with planned(run, config) as here:
        model = open_skeleton(here.model).model
        prepare(model, run.lora, run.train.seed, known=False)
        rough = plan_memory(model, trained_blocks(model))
    plain, again = (rough.peak(run.data.max_length, checkpoint) for checkpoint in (False, True))
    wished = run.train.checkpoint_blocks
    checkpoint = plain > budget if wished == "auto" else bool(wished)
    return (again if checkpoint else plain), checkpoint


def header(recipe: Path) -> tuple[str, int]:
    """(what a recipe's header says that it needs, the budget in which: bytes)."""
    found = PREDICTION.search(recipe.read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit(f"{recipe}: its header has no line '# Memory: from ... of ... GB'")
    return found["said"], parse_size(found["budget"], str(recipe))


def table() -> str:
    """The list of recipes in recipes/README.md, from their headers."""
    lines = ["| recipe | for | model | memory |", "|---|---|---|---|"]
    for recipe in RECIPES:
        purpose = recipe.read_text(encoding="utf-8").split("\n")[0].strip("# .")
        model = RunConfig.load(recipe).model.rpartition("/")[2]
        said, budget = header(recipe)
        cells = (
            f"[{recipe.stem}]({recipe.name})",
            purpose,
            model,
            f"from {said} of {budget / 1e9:g} GB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table() -> None:
    page = HERE / "README.md"
    before, rest = page.read_text(encoding="utf-8").split("<!-- recipes -->\n")
    after = rest.split("<!-- /recipes -->")[1]
    marked = f"<!-- recipes -->\n{table()}<!-- /recipes -->"
    page.write_text(before + marked + after, encoding="utf-8")


def main(words: list[str]) -> None:
    """Print what is counted; with --write, say it where it is read."""
    for recipe in RECIPES:
        _, budget = header(recipe)
        run = RunConfig.load(recipe)
        needed, again = count(run, SHAPES[run.model], budget)
        how = ", blocks computed again" if again else ""
        fits = "" if needed <= budget else ": DOES NOT FIT"
        print(f"{recipe.name}: {gigabytes(needed)} of {gigabytes(budget)}{how}{fits}")
        if words == ["--write"]:
            text = recipe.read_text(encoding="utf-8")
            new = f"# Memory: from {gigabytes(needed)} of {budget / 1e9:g} GB"
            recipe.write_text(PREDICTION.sub(new, text, count=1), encoding="utf-8")
    if words == ["--write"]:
        write_table()


if __name__ == "__main__":
    main(sys.argv[1:])
