"""What a page says of a run in words and figures: facts, options, answers, commands."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlora.config import RunConfig
from mlxlora.console import clock, size
from mlxlora.errors import CheckpointError
from mlxlora.readers import read_json
from mlxlora.runs import Run
from mlxlora.schema import by_key
from mlxlora.train.events import Resumed, Sample, Skipped, Step
from mlxlora.train.places import ADAPTER, CONFIG

Facts = list[tuple[str, str]]
WEIGHTS = "adapters.safetensors"


@dataclass(frozen=True)
class Answers:
    """What was answered to one prompt, over the run."""

    prompt: str
    first: Sample
    last: Sample
    between: tuple[Sample, ...]


@dataclass(frozen=True)
class Option:
    key: str
    value: str
    default: str
    changed: bool


def headline(run: Run) -> Facts:
    """The facts that come first."""
    steps, start = run.every(Step), run.start
    found: Facts = [("state", _state(run))]
    if run.before is not None and run.best is not None:
        fall = 1 - run.best.loss / run.before if run.before else 0.0
        found.append(
            (
                "validation loss",
                f"{run.before:.4f} → {run.best.loss:.4f} ({-100 * fall:+.1f} %), "
                f"best at update {run.best.update:,}",
            )
        )
        found.append(("perplexity", f"best {run.best.perplexity:.4g}"))
    elif steps:
        found.append(("training loss", f"{steps[0].loss:.4f} → {steps[-1].loss:.4f}"))
    if steps and start is not None:
        found.append(("updates", f"{run.updates:,} of {start.updates:,}"))
        tokens = sum(step.tokens for step in steps)
        seconds = sum(step.seconds for step in steps)
        found.append(("trained on", f"{tokens:,} supervised tokens"))
        rate = tokens / max(seconds, 1e-9)
        found.append(("time", f"{clock(seconds)} of updates, {rate:,.0f} tokens/s"))
        found.append(("peak memory", _peak(run, start.memory_limit)))
    weights = run.path / ADAPTER / WEIGHTS
    if weights.is_file():
        found.append(("adapter", f"{size(weights.stat().st_size)}{_trained(run)}"))
    return found


def _state(run: Run) -> str:
    words = {
        "finished": "finished",
        "early stop": "stopped early: validation had stopped improving",
        "interrupted": f"interrupted after update {run.updates:,}; it can go on",
        "running": f"running, update {run.updates:,}",
        "cut off": f"cut off after update {run.updates:,}; it can go on",
    }[run.state]
    again, lost = len(run.every(Resumed)), len(run.every(Skipped))
    words += f"; resumed {again}x" if again else ""
    return words + (f"; {lost} updates skipped, their loss was no number" if lost else "")


def _peak(run: Run, limit: int) -> str:
    peak = max(step.peak_memory for step in run.every(Step))
    return size(peak) + (f" of {size(limit)} that training may hold" if limit else "")


def _trained(run: Run) -> str:
    start = run.start
    if start is None or not start.parameters:
        return ""
    share = 100 * start.trainable / start.parameters
    return f", {start.trainable:,} of {start.parameters:,} parameters ({share:.3g} %)"


def remarks(run: Run) -> list[str]:
    """What went otherwise than wished, and notes of the run."""
    start = run.start
    found = list(start.notes) if start is not None else []
    done = run.done
    if done is not None:
        counts = ((done.truncated_rows, "cut to data.max_length"), (done.dropped_rows, "left out"))
        found += [f"{count:,} rows were {what}" for count, what in counts if count]
    for event in run.every(Resumed):
        found += [f"resumed after update {event.update:,}", *event.notes]
    for skipped in run.every(Skipped):
        where = ", ".join(skipped.rows)
        found.append(f"update {skipped.update:,} skipped: {skipped.reason} ({where})")
    if run.unread:
        found.append(f"{run.unread:,} lines of the log could not be read")
    return found


def answers(run: Run) -> list[Answers]:
    """By prompt, in the order of the config."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in run.every(Sample):
        by_prompt.setdefault(sample.prompt, []).append(sample)
    return [
        Answers(prompt, samples[0], samples[-1], tuple(samples[1:-1]))
        for prompt, samples in by_prompt.items()
    ]


def options(config: RunConfig) -> list[Option]:
    """Every option, those that are not as by default first."""
    usual = by_key(RunConfig().to_dict())
    found = [
        Option(key, _shown(value), _shown(usual[key]), value != usual[key])
        for key, value in by_key(config.to_dict()).items()
    ]
    return sorted(found, key=lambda option: not option.changed)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def origin(run: Run) -> Facts:
    """Where the adapter comes from."""
    base = run.origin.base
    found: Facts = [("base" if k == "name" else f"base {k}", v) for k, v in base.items() if v]
    for split, told in run.origin.data.items():
        rows = f"{told['rows']:,} of {told['path']}, digest {told['digest']}"
        found.append((f"{split} rows", rows))
    found += list(_weights(run.path / ADAPTER / "provenance.json"))
    return found + [(name, str(told)) for name, told in run.origin.versions.items()]


def _weights(path: Path) -> Iterator[tuple[str, str]]:
    provenance = told_in(path)
    if isinstance(provenance.get("weights_sha256"), str):
        yield "adapter sha256", provenance["weights_sha256"]


def told_in(path: Path) -> Mapping[str, Any]:
    """The JSON object of a file that may be gone, or be none."""
    try:
        return read_json(path, CheckpointError)
    except CheckpointError:
        return {}


def commands(run: Run) -> list[tuple[str, str]]:
    """What to type: again, on, and what to do with the adapter."""
    model, adapter = run.config.model, str(run.path / ADAPTER)
    again = ["train", str(run.path / CONFIG), "--out", f"{run.path}-again"]
    found = [(f"the same run again (begun in {run.origin.folder})", again)]
    if run.state in ("interrupted", "cut off"):
        found.append(("go on with it", ["resume", str(run.path)]))
    if (run.path / ADAPTER).is_dir():
        named = ["--model", model, "--adapter", adapter]
        found.append(("talk to it", ["chat", *named]))
        rows = ["--with-base", "--data", run.config.data.path]
        found.append(("measure it", ["eval", *named, *rows]))
        found.append(("one model of base and adapter", ["fuse", *named, "--out", "fused"]))
    return [(what, shlex.join(["mlxlora", *words])) for what, words in found]
