"""The quickstart as library calls: measure the base, train, measure, fuse, measure again.

play() yields what happens, in order, and prints nothing; every figure is measured here.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxlora.base import load
from mlxlora.config import DataConfig, RunConfig
from mlxlora.errors import MlxLoraError
from mlxlora.evaluation.evaluate import Progress, evaluate
from mlxlora.evaluation.results import Result
from mlxlora.export.fuse import Fused, fuse
from mlxlora.files import refuse_existing
from mlxlora.lora.adapter import Adapter
from mlxlora.schema import toml_value
from mlxlora.train.events import Event
from mlxlora.train.loop import train

HERE = Path(__file__).parent
BASE = HERE / "base"
DATA = HERE / "data"
MAX_TOKENS = 64
# The tiny base is far from large models' best settings, so the recipe says its own.
RECIPE = HERE / "recipe.toml"


@dataclass(frozen=True)
class Chapter:
    """A heading and a sentence."""

    title: str
    text: str


@dataclass(frozen=True)
class End:
    """The measured figures of the whole story."""

    base: Result
    tuned: Result
    fused: Result
    same_answers: float  # share of prompts that the fused model answers like base + adapter
    seconds: float


Scene = Chapter | Iterator[Event] | Result | Fused | End


def play(directory: Path, progress: Progress) -> Iterator[Scene]:
    """Yield the scenes; a scene that is an iterator of events must be consumed.

    Raises ExportError if directory exists.
    """
    if not (BASE / "config.json").exists():
        raise MlxLoraError("this installation lacks the bundled base; reinstall mlxlora")
    refuse_existing(directory)
    started = time.perf_counter()
    data = DataConfig(path=str(DATA / "test.jsonl"))
    base = load(BASE)
    yield Chapter(
        "1. The base",
        f"A bundled language model of {base.parameters / 1e6:.1f} million parameters at 4 bits. "
        "It chats a little, but has never seen the JSON commands of the sample task.",
    )
    before = next(evaluate(base, data, generate=True, max_tokens=MAX_TOKENS, progress=progress))
    yield before
    rows = (DATA / "train.jsonl").read_bytes().count(b"\n")
    yield Chapter("2. Training", f"LoRA on {rows:,} examples; the base itself stays as it is.")
    places = {"model": BASE, "out": directory / "run", "data.path": DATA}
    run = RunConfig.load(RECIPE, [f"{key}={toml_value(str(p))}" for key, p in places.items()])
    yield train(run, base)
    adapter = Adapter.load(directory / "run" / "adapter")
    yield Chapter("3. The tuned model", "The same held-out requests, with the adapter attached.")
    named = [("tuned", adapter)]
    tuned = next(
        evaluate(base, data, named, generate=True, max_tokens=MAX_TOKENS, progress=progress)
    )
    yield tuned
    yield Chapter("4. Fusing", "Base and adapter as one model on disk, loaded again and asked.")
    # 8 bits are written at once; to choose them takes longer than this story has. Tried below.
    yield fuse(base, adapter, directory / "fused", 8, proof=None)
    fused_base = load(directory / "fused")
    fused = next(
        evaluate(fused_base, data, generate=True, max_tokens=MAX_TOKENS, progress=progress)
    )
    fused = dataclasses.replace(fused, name="fused")
    yield fused
    same = [a.got == b.got for a, b in zip(tuned.answers, fused.answers, strict=True)]
    seconds = time.perf_counter() - started
    yield End(before, tuned, fused, sum(same) / len(same), seconds)
