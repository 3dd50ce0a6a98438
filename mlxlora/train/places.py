"""Where things are in a run's directory. Imports nothing, so that a supervisor stays small."""

from pathlib import Path

CONFIG, START, LOG = "run.toml", "start.json", "log.jsonl"
CHECKPOINTS, ADAPTER = "checkpoints", "adapter"
STEP = "step-"  # checkpoints/step-00000100


def checkpoint_path(directory: Path, update: int) -> Path:
    return directory / CHECKPOINTS / f"{STEP}{update:08d}"


def checkpoints_in(directory: Path) -> dict[int, Path]:
    """The run's checkpoints by update, newest first."""
    found = {
        int(number): path
        for path in (directory / CHECKPOINTS).glob(f"{STEP}*")
        if (number := path.name.removeprefix(STEP)).isdecimal() and path.is_dir()
    }
    return dict(sorted(found.items(), reverse=True))
