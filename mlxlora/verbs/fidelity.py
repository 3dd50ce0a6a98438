"""What fuse and export say of how much of the training is in what they wrote; its options."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlora.errors import ConfigError

if TYPE_CHECKING:
    from mlxlora.console import Screen
    from mlxlora.export.fidelity import Fidelity
    from mlxlora.export.proof import Proof

WORST = 3  # layers shown
SEEN = 0.02  # an error that may be noticed

ProofRows = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="rows to compare with base + adapter on: JSONL file or directory",
        show_default="those the run kept for validation, else a bundled text",
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        min=0,
        help="leave no model that is further from base + adapter, in nats per token",
        show_default="half of what the adapter changes, between 0.01 and 0.1",
    ),
]
Measured = Annotated[
    bool,
    typer.Option(
        "--fidelity/--no-fidelity", help="measure whether what is written is what was trained"
    ),
]


def proof(
    data: str | None,
    max_kl: float | None,
    measured: bool,
    trust: bool,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> "Proof | None":
    """What the options ask for."""
    from mlxlora.config import RunConfig
    from mlxlora.export.proof import Proof
    from mlxlora.export.trial import named
    from mlxlora.schema import toml_value

    if not measured:
        if data is not None or max_kl is not None:
            raise ConfigError("--no-fidelity measures nothing, so --data and --max-kl say nothing")
        return None
    rows = RunConfig.load(None, [f"data.path={toml_value(data)}"]).data if data else None
    if rows is not None:
        named(rows)  # before hours go by, not after: raises DataError
    return Proof(rows, max_kl, trust, progress)


def show(screen: "Screen", found: "Fidelity", name: str) -> None:
    """The verdict, what it rests on, and the layers that were written worst."""
    screen.say(f"On {found.rows}, {found.tokens:,} tokens:")
    adapted = found.kl_base > 0
    rows = [("base", found.loss_base, found.kl_base, found.agreement_base)]
    if adapted:
        rows.append(("base + adapter", found.loss_adapter, 0.0, 1.0))
    rows.append((name, found.loss_written, found.kl, found.agreement))
    screen.table(
        ["model", "loss", "KL", "same first choice"],
        [[label, f"{loss:.4f}", f"{kl:.2g}", f"{same:.1%}"] for label, loss, kl, same in rows],
    )
    screen.say("(KL: how far its answers are from those of base + adapter; 0 is the same.)", "dim")
    if any((one.output_error or 0) > SEEN for one in found.layers):
        screen.say("The layers whose change was written worst (0 % is exact):")
        screen.table(
            ["layer", "weights", "outputs", "cosine"],
            [
                [
                    one.layer,
                    f"{one.weight_error:.1%}",
                    "-" if one.output_error is None else f"{one.output_error:.1%}",
                    "-" if one.output_cosine is None else f"{one.output_cosine:.4f}",
                ]
                for one in found.worst(WORST)
            ],
        )
    if adapted:
        screen.say(*_verdict(found))


def _verdict(found: "Fidelity") -> tuple[str, str]:
    """(words, style)."""
    if not found.own_rows:
        return (
            "These rows are of no task; --data with rows of yours says how much of the training "
            "is kept.",
            "dim",
        )
    if found.kept is None:
        return "On these rows the adapter is no better than the base.", "yellow"
    style = "green" if found.kept >= 0.9 else "yellow" if found.kept >= 0.5 else "red"
    return f"{found.kept:.1%} of what training gained is kept.", style


def figures(found: "Fidelity | None") -> dict[str, Any]:
    """For the last line of --json: the figures without the layers."""
    if found is None:
        return {}
    return {"fidelity": {k: v for k, v in found.to_dict().items() if k != "layers"}}
