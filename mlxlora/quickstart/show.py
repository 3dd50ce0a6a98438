"""The quickstart on the screen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxlora.console import Screen, clock, size
from mlxlora.display import TrainingDisplay
from mlxlora.evaluation.results import Result
from mlxlora.export.fuse import Fused
from mlxlora.quickstart.story import BASE, Chapter, End, play

EXAMPLES = 3
YOURS = ("--model", "mlx-community/Qwen3-0.6B-4bit")


def show(directory: Path, as_json: bool) -> None:
    """Play the story and print it; with --json, the figures as the last line."""
    screen = Screen(as_json)
    screen.heading("mlxlora quickstart")
    for scene in play(directory, screen.progress):
        _show(screen, scene)
        if isinstance(scene, End):
            _end(screen, directory, scene)


def _show(screen: Screen, scene: Any) -> None:
    if isinstance(scene, Chapter):
        screen.heading(scene.title)
        screen.say(scene.text)
    elif isinstance(scene, Iterator):
        TrainingDisplay(screen).show(scene)
    elif isinstance(scene, Result):
        _answers(screen, scene)
    elif isinstance(scene, Fused):
        screen.say(f"{scene.path}: {size(scene.bytes)}, the trained layers at {scene.bits}")


def _answers(screen: Screen, result: Result) -> None:
    for answer in result.answers[:EXAMPLES]:
        screen.line(f"  > {answer.prompt}", "dim")
        got = answer.got.strip() or "(nothing)"
        screen.line(f"    {got}", "green" if answer.exact else "red")
    right = sum(answer.exact for answer in result.answers)
    screen.say(f"{right} of {len(result.answers)} held-out requests exactly right", "bold")


def _end(screen: Screen, directory: Path, end: End) -> None:
    screen.heading("What happened")
    results = [("base", end.base), ("tuned", end.tuned), ("fused", end.fused)]
    screen.table(
        ["model", "exactly right", "loss", "perplexity"],
        [
            [name, f"{r.exact_match:.1%}", f"{r.loss:.3f}", f"{r.perplexity:.4g}"]
            for name, r in results
        ],
    )
    screen.say(
        f"{end.same_answers:.1%} of the answers of the fused model are those of base + adapter. "
        f"All in {clock(end.seconds)}."
    )
    screen.heading("Go on")
    for text, *words in (
        ("talk to it", "chat", "--model", directory / "fused"),
        ("your model, your rows", "train", *YOURS, "--data", "my.jsonl", "--out", "runs/mine"),
        ("then", "chat", *YOURS, "--adapter", "runs/mine/adapter"),
    ):
        screen.say(f"{text}:", "dim")
        screen.command("mlxlora", *words)
    screen.result(
        {
            "seconds": round(end.seconds, 1),
            "same_answers": end.same_answers,
            "base_model": str(BASE),
            "results": [
                {"name": name, "exact_match": r.exact_match, "loss": r.loss, "rows": r.rows}
                for name, r in results
            ],
        }
    )
