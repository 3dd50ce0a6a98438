"""python -m mlxlora.bench.memory: forecasts of a run's peak memory beside what MLX measured.

Each setting is a model directory of random weights and a file of rows, made for it and trained
for a few updates by mlxlora itself; forecast and run have a fresh process each. NAME... runs the
settings whose names contain one of these words.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxlora.bench.shapes import GROUP_SIZE, build
from mlxlora.config import RunConfig
from mlxlora.files import save_tensors
from mlxlora.train.events import Done
from mlxlora.train.forecast import forecast
from mlxlora.train.loop import train

ROWS = 48
UPDATES = 3


@dataclass(frozen=True)
class Setting:
    """A model and a run."""

    family: str = "qwen3"
    hidden: int = 256
    blocks: int = 4
    words: int = 4096
    bits: int = 0
    rows: str = "mixed"
    options: tuple[str, ...] = ("train.batch_size=4",)

    def config(self) -> dict[str, Any]:
        """config.json, with heads of 64 and grouped keys."""
        heads = self.hidden // 64
        own = {"quantization": {"group_size": GROUP_SIZE, "bits": self.bits}} if self.bits else {}
        return {
            "model_type": self.family,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.blocks,
            "intermediate_size": 3 * self.hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "head_dim": 64,
            "vocab_size": self.words,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "eos_token_id": 0,
            **own,
        }


# Characters of a row, each a token; half of them are trained.
LENGTHS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "short": lambda draw: draw.integers(24, 64, ROWS),
    "mixed": lambda draw: np.clip(draw.lognormal(4.8, 0.8, ROWS), 24, 800).astype(int),
    "long": lambda draw: np.full(ROWS, 1000),
}

_BASES = {
    "small words": Setting(words=512),
    "large words": Setting(family="llama", words=100_352),
    "4 bits": Setting(family="llama", hidden=512, words=8192, bits=4),
}
# What is varied over each base: name -> (rows, options).
_RUNS = {
    "short rows": ("short", ("train.batch_size=8",)),
    "mixed rows": ("mixed", ("train.batch_size=8",)),
    "long rows": ("long", ("train.batch_size=2",)),
    "long rows, recomputed": ("long", ("train.batch_size=2", "train.checkpoint_blocks=true")),
    "mixed, 512 at once": ("mixed", ("train.batch_size=8", "train.tokens_per_microbatch=512")),
    "mixed, rank 64": ("mixed", ("train.batch_size=4", "lora.rank=64")),
}
_OTHERS = {
    "12 blocks": Setting(blocks=12, words=32_000, options=("train.batch_size=4",)),
    "12 blocks, recomputed": Setting(
        blocks=12, words=32_000, options=("train.batch_size=4", "train.checkpoint_blocks=true")
    ),
    "hidden 768": Setting(hidden=768, words=2048, options=("train.batch_size=2",)),
    "4 bits, large words": Setting(hidden=512, words=151_936, bits=4),
    "last 2 of 8 blocks": Setting(blocks=8, options=("train.batch_size=4", "lora.blocks=2")),
    "dropout": Setting(options=("train.batch_size=4", "lora.dropout=0.1")),
    "padded": Setting(options=("train.batch_size=4", "train.packing=false")),
    "attention only": Setting(
        options=("train.batch_size=4", "lora.targets=['q_proj', 'v_proj']", "lora.rank=4")
    ),
    "embedding adapted": Setting(
        words=2048, options=("lora.targets=['all-linear', 'embed_tokens']", "train.batch_size=4")
    ),
    "full": Setting(options=("train.batch_size=4", "lora.method='full'")),
    "full, muon": Setting(
        options=("train.batch_size=2", "lora.method='full'", "train.optimizer='muon'")
    ),
    "gpt2-sized words, full": Setting(
        words=50_257, rows="short", options=("train.batch_size=8", "lora.method='full'")
    ),
}
SETTINGS: dict[str, Setting] = {
    **{
        f"{base}, {run}": dataclasses.replace(setting, rows=rows, options=options)
        for base, setting in _BASES.items()
        for run, (rows, options) in _RUNS.items()
    },
    **_OTHERS,
}


@dataclass(frozen=True)
class Outcome:
    """Bytes."""

    name: str
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def write(setting: Setting, directory: Path) -> RunConfig:
    """Make the model and the rows of a setting; returns its run."""
    model, data = directory / "model", directory / "rows.jsonl"
    model.mkdir(parents=True)
    mx.random.seed(0)
    weights = dict(tree_flatten(build(setting.config(), setting.bits).parameters()))
    save_tensors(model / "model.safetensors", weights, {"format": "mlx"})
    (model / "config.json").write_text(json.dumps(setting.config()))
    _write_tokenizer(model)
    draw = np.random.default_rng(0)
    with data.open("w") as file:
        for length in LENGTHS[setting.rows](draw):
            half = int(length) // 2
            row = {"prompt": "a" * half, "completion": "b" * (int(length) - half)}
            file.write(json.dumps(row) + "\n")
    places = [f"model='{model}'", f"data.path='{data}'", f"out='{directory / 'run'}'"]
    updates = [f"train.updates={UPDATES}", "data.valid_fraction=0.05"]
    return RunConfig.load(None, [*places, *updates, *setting.options])


def _write_tokenizer(directory: Path) -> None:
    """A token for the end, and one for each of two letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def measure(name: str) -> Outcome:
    """Forecast a setting and run it, in a process each."""
    with tempfile.TemporaryDirectory() as directory:
        write(SETTINGS[name], Path(directory))
        answers = [_in_process(what, name, directory) for what in ("forecast", "run")]
    return Outcome(name, *answers)


def _in_process(what: str, name: str, directory: str) -> int:
    words = [sys.executable, "-m", "mlxlora.bench.memory", f"--{what}", name, directory]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {what} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def _answer(what: str, name: str, directory: Path) -> int:
    places = [f"model='{directory / 'model'}'", f"data.path='{directory / 'rows.jsonl'}'"]
    options = [f"train.updates={UPDATES}", "data.valid_fraction=0.05", *SETTINGS[name].options]
    run = RunConfig.load(None, [*places, f"out='{directory / 'run'}'", *options])
    if what == "--forecast":
        return forecast(run).peak
    (done,) = (event for event in train(run) if isinstance(event, Done))
    return done.peak_memory


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] in ("--forecast", "--run"):
        print(_answer(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
        return
    words = sys.argv[1:] or [""]
    print(f"{'setting':40}{'predicted':>12}{'measured':>12}{'ratio':>8}")
    outcomes = []
    for name in SETTINGS:
        if any(word in name for word in words):
            outcomes.append(one := measure(name))
            sizes = (f"{size / 1e6:.0f} MB" for size in (one.predicted, one.measured))
            print(f"{name:40}{next(sizes):>12}{next(sizes):>12}{one.ratio:>8.2f}", flush=True)
    off = [one for one in outcomes if not 0.85 <= one.ratio <= 1.15]
    print(f"{len(outcomes)} settings, {len(outcomes) - len(off)} within 15 %")


if __name__ == "__main__":
    main()
