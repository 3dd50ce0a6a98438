"""By which name a tracker knows a run: kept with it, so that a resumed run goes on there."""

from collections.abc import Callable
from pathlib import Path

from mlxlora.errors import CheckpointError
from mlxlora.files import write_json
from mlxlora.readers import read_json

FILE = "trackers.json"


def known(directory: Path, tracker: str, name: Callable[[], str]) -> str:
    """The name told before, or a new one, which is kept."""
    path = directory / FILE
    names = read_json(path, CheckpointError) if path.exists() else {}
    if not isinstance(names.get(tracker), str):
        names[tracker] = name()
        write_json(path, names)
    return str(names[tracker])
