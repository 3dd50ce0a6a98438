"""What a written model has to show before it may stay: that it is still what was trained.

It is measured where it was written, before it takes its place, so a model that lost what was
trained is not left behind for somebody to find.
"""

from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from mlxlora.base import open_frozen, open_tokenizer
from mlxlora.config import DataConfig
from mlxlora.errors import ExportError
from mlxlora.export.fidelity import Fidelity, Open, Progress, measure
from mlxlora.export.merged import Merged
from mlxlora.export.trial import trial
from mlxlora.files import write_json

FILE = "fidelity.json"


@dataclass(frozen=True)
class Proof:
    """How a written model is measured, and what it may not exceed."""

    rows: DataConfig | None = None  # else those that the adapter's run kept for validation
    max_kl: float | None = None  # nats per token from base + adapter; else Fidelity.limit
    trust_remote_code: bool = False
    progress: Progress = lambda what, done, of: None

    def of(self, merged: Merged, written: Open, remedy: str) -> Fidelity:
        """Measure, and return the figures; save() writes them.

        Raises ExportError, which ends with remedy, if the model is not what was trained; a base
        without an adapter is measured and never refused, unless max_kl is set.
        """
        tokenizer = open_tokenizer(merged.source, merged.config, self.trust_remote_code)
        tokenizer._vocabulary = merged.vocabulary  # tokens past its end are refused, not read
        rows = trial(tokenizer, merged.adapter, self.rows)
        found = measure(
            merged.source,
            merged.adapter,
            written,
            rows,
            progress=self.progress,
            trust_remote_code=self.trust_remote_code,
        )
        limit = self.max_kl
        if limit is None:
            limit = found.limit if merged.adapter is not None else float("inf")
        if not found.kl <= limit:  # NaN is no proof
            raise ExportError(_refusal(found, limit, remedy))
        return found


def save(found: Fidelity, file: Path) -> None:
    """Write fidelity.json, or what it is called beside a file."""
    write_json(file, found.to_dict())


def written(directory: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model in a directory, its weights not read yet, for a proof."""
    return open_frozen(directory, trust_remote_code)[0]


def _refusal(found: Fidelity, limit: float, remedy: str) -> str:
    kept = "" if found.kept is None else f"; {found.kept:.0%} of what training gained is kept"
    return (
        f"written this way, the model is too far from base + adapter: KL {found.kl:.3g} per token, "
        f"where {limit:.3g} is allowed and the bare base has {found.kl_base:.3g}{kept} "
        f"(on {found.rows}). It was not left behind.\n{remedy}. --max-kl allows more."
    )


PROOF = Proof()
