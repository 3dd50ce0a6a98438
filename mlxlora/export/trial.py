"""The rows that a model just written is tried on, and those that its rounding is fitted to.

The rows that a run kept for validation say whether what it learned is still there; they are
found beside the adapter, in its run's directory, if they are still what they were. Without them
a bundled text says at least how far two models have come apart.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxlora.config import DataConfig, RunConfig
from mlxlora.data.batches import Batch, pad, render_row
from mlxlora.data.records import Rows, open_file, open_splits
from mlxlora.data.render import Example, Renderer
from mlxlora.errors import DataError, MlxLoraError
from mlxlora.lora.adapter import Adapter
from mlxlora.readers import expanded, read_json
from mlxlora.train.directory import describe
from mlxlora.train.places import START

TEXT = Path(__file__).parent / "text.jsonl"
TOKENS = 8192  # of all rows together, padding included
LONGEST = 1024  # tokens of a row

Part = Literal["train", "valid"]


@dataclass(frozen=True)
class Trial:
    """Rows as a model sees them, all in one batch."""

    batch: Batch
    rows: int
    source: str  # what they are, in words
    own: bool  # of the task that the adapter was trained for

    @property
    def inputs(self) -> mx.array:
        """(B, T) tokens, padded at their ends."""
        return mx.array(self.batch.inputs)


def trial(
    tokenizer: Any,
    adapter: Adapter | None = None,
    data: DataConfig | None = None,
    part: Part = "valid",
    tokens: int = TOKENS,
) -> Trial:
    """Rows of data, else of the adapter's own run, else of the bundled text.

    part: of the run's rows. Rows are spread evenly over all there are, as many as fit into so
    many tokens. Raises DataError if those of data cannot be used.
    """
    if data is not None:
        rows = named(data)
        return _trial(tokenizer, rows, data, tokens, f"of {rows.file.path.name}", own=True)
    found = own_rows(adapter, part) if adapter is not None else None
    if found is not None:
        rows, config = found
        kept = "kept for validation" if part == "valid" else "trained on"
        return _trial(tokenizer, rows, config, tokens, f"{kept} by the adapter's run", own=True)
    config = DataConfig(mask="all")
    rows = open_file(TEXT, config)
    return _trial(tokenizer, rows, config, tokens, "of the bundled text", own=False)


def _trial(
    tokenizer: Any, rows: Rows, config: DataConfig, tokens: int, source: str, *, own: bool
) -> Trial:
    renderer = Renderer(tokenizer, config)
    chosen: list[Example] = []
    longest = 0
    for number in _spread(len(rows)):
        example = _cut(render_row(rows, number, renderer, skip_refused=True))
        if example is None:
            continue
        longest = max(longest, len(example.tokens))
        if chosen and longest * (len(chosen) + 1) > tokens:
            break
        chosen.append(example)
    if not chosen:
        raise DataError(f"no row {source} has a token to compare")
    return Trial(pad(chosen), len(chosen), f"{len(chosen):,} rows {source}", own)


def _spread(count: int) -> list[int]:
    """All numbers below count, so ordered that the first few are spread over all."""
    return [int(n) for n in np.random.default_rng(0).permutation(count)]


def _cut(example: Example | None) -> Example | None:
    """The row's last LONGEST tokens, where its answer is; None if nothing in it is trained."""
    if example is None:
        return None
    tokens, mask = example.tokens[-LONGEST:], example.mask[-LONGEST:]
    short = Example(example.row, tokens, mask, example.truncated)
    return short if short.supervised else None


def named(data: DataConfig) -> Rows:
    """Of a file, or of the validation (else test) rows of a directory."""
    path = expanded(data.path)
    if not path.is_dir():
        return open_file(path, data)
    splits = open_splits(data, 0)
    rows = splits.valid or splits.test
    if rows is None:
        raise DataError(f"{path} has neither valid.jsonl nor test.jsonl; name a file")
    return rows


def own_rows(adapter: Adapter, part: Part) -> tuple[Rows, DataConfig] | None:
    """The rows of the run in whose directory the adapter lies, if they are unchanged."""
    start = adapter.home.parent / START if adapter.home is not None else None
    if start is None or not start.is_file():
        return None
    try:
        told = read_json(start, DataError)
        run = RunConfig.from_dict(told["run"])
        path = expanded(Path(str(told["folder"])) / expanded(run.data.path))
        data = DataConfig(**{**vars(run.data), "path": str(path), "on_bad_row": "skip"})
        splits = open_splits(data, run.train.seed)
        rows = {"train": splits.train, "valid": splits.valid}[part]
        before = ((adapter.provenance.get("data") or {}).get("files") or {}).get(part) or {}
        if rows is None or describe(splits)[part]["digest"] != before.get("digest"):
            return None
    except (MlxLoraError, KeyError, TypeError):
        return None  # moved, changed or gone: not a fault of what is written now
    return rows, data
