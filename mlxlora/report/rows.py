"""The rows of a run as its page shows them: if its rows and its tokenizer are still there."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from mlxlora.base import open_tokenizer
from mlxlora.data.inspect.summary import Inspection, inspect
from mlxlora.errors import MlxLoraError, ModelError
from mlxlora.readers import expanded, read_json
from mlxlora.runs import Run

SHOWN = 3  # rows
TOO_LARGE = 200 << 20  # bytes of rows that are not read again for a page


@dataclass(frozen=True)
class Looked:
    """What there is to show, or why there is nothing."""

    found: Inspection | None
    missing: str = ""


def look(run: Run) -> Looked:
    """Look at the run's rows again. Nothing is fetched, and none of a model's code runs."""
    data = replace(run.config.data, path=run.origin.find(run.config.data.path))
    try:
        if _bytes(expanded(data.path)) > TOO_LARGE:
            return Looked(None, "they are many; mlxlora data shows them")
        tokenizer = _tokenizer(run.origin.find(run.config.model))
        found = inspect(data, tokenizer, seed=run.config.train.seed, rows=SHOWN, near=False)
    except (MlxLoraError, OSError) as error:
        return Looked(None, str(error))
    return Looked(found)


def _bytes(path: Path) -> int:
    files = path.glob("*.jsonl*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _tokenizer(model: str) -> Any:
    path = expanded(model)
    if not path.is_dir():
        try:
            path = Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, ValueError) as error:
            raise ModelError(f"the base {model} is not on this machine") from error
    return open_tokenizer(path, read_json(path / "config.json", ModelError))
