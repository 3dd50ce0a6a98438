"""mlxlora adapter merge."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mlxlora.errors import ConfigError
from mlxlora.verbs.options import AsJson

WEIGHTS = "--weights"
FAR = 0.5  # of the weighted sum: a result that is something else
OtherBases = Annotated[bool, typer.Option("--force", help="go on with adapters of several bases")]


class Spread(TyperCommand):
    """A command whose --weights may be followed by several numbers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(words: list[str]) -> list[str]:
    """--weights 0.7 -0.3 as --weights 0.7 --weights -0.3: an option has one value."""
    found: list[str] = []
    weighing = False  # numbers are weights
    for number, word in enumerate(words):
        if word == "--":
            return found + words[number:]
        if found[-1:] != [WEIGHTS]:  # no value of the word before
            if weighing and numbers(word):
                found.append(WEIGHTS)
            else:
                weighing = word.partition("=")[0] == WEIGHTS
        found.append(word)
    return found


def numbers(word: str) -> list[float]:
    """Those of "0.7" or "0.7,0.3"; none if anything else is in it."""
    try:
        return [float(part) for part in word.split(",") if part]
    except ValueError:
        return []


def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="A", help="adapter directories")],
    out: Annotated[Path, typer.Option("--out", help="directory of the new adapter")],
    weights: Annotated[
        list[str] | None,
        typer.Option(
            WEIGHTS,
            metavar="W ...",
            help="one an adapter, in their order: 0.7 0.3 or 0.7,0.3; below 0 takes away",
            show_default="equal ones that sum to 1",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="linear|cat|svd|ties|dare",
            help="cat: exactly the sum of what they do, its rank the sum of theirs; svd: the best "
            "of a lower rank; linear, ties, dare: A with A and B with B, for adapters of one rank",
        ),
    ] = "svd",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            min=1,
            help="of the result; a lower one keeps the best of what the method made",
            show_default="the largest; of cat the sum",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            help="ties, dare: share of the numbers that is kept",
            show_default="ties 0.2, dare 0.9",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="dare: of what is dropped", show_default="0"),
    ] = None,
    force: OtherBases = False,
    as_json: AsJson = False,
) -> None:
    """Mix several adapters of one base into one."""
    from mlxlora.console import Screen
    from mlxlora.files import hash_file, refuse_existing
    from mlxlora.lora.adapter import WEIGHTS as FILE
    from mlxlora.lora.adapter import Adapter
    from mlxlora.lora.merge import merge as merged
    from mlxlora.readers import expanded
    from mlxlora.train.directory import versions

    refuse_existing(out)
    for word in weights or ():
        if not numbers(word):
            raise ConfigError(f"--weights must be numbers, as in 0.7 0.3 or 0.7,0.3, not {word!r}")
    given = [number for word in weights for number in numbers(word)] if weights else None
    loaded = []
    for path in adapters:
        adapter = Adapter.load(path)
        told = {"weights_sha256": hash_file(expanded(path) / FILE), **adapter.provenance}
        loaded.append(dataclasses.replace(adapter, provenance=told))
    names = [str(path) for path in adapters]
    result = merged(loaded, given, method, rank, density, seed, names=names, force=force)
    provenance = {**result.provenance, "versions": versions()}
    result = dataclasses.replace(result, provenance=provenance)
    result.save(out)
    told = result.provenance["merge"]
    used = [parent["weight"] for parent in told["parents"]]
    screen = Screen(as_json)
    screen.facts(
        [
            ("merged", f"{len(loaded)} adapters by {method}, {len(result.modules)} layers"),
            *((f"{w:g}", name) for w, name in zip(used, names, strict=True)),
            ("rank", f"{result.rank}"),
            ("distance", f"{told['distance']:.1%} off the weighted sum of what they do"),
            ("written", str(out)),
        ]
    )
    if told["distance"] > FAR:
        screen.say(
            f"That is far off: {method} mixes the A of one with the B of another. Compare with "
            "--method svd or cat (mlxlora eval).",
            "yellow",
        )
    screen.result(
        {
            "path": str(out),
            "modules": len(result.modules),
            "weights": used,
            **{"rank": result.rank, **{k: v for k, v in told.items() if k != "parents"}},
        }
    )
