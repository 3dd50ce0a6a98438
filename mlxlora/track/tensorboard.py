"""TensorBoard: event files in the run's directory, written by tensorboardX."""

import shlex
from pathlib import Path

from tensorboardX import SummaryWriter

from mlxlora.config import RunConfig
from mlxlora.track.figures import settings

FOLDER = "tensorboard"


class TensorBoard:
    """Writes RUN/tensorboard. A resumed run takes back what came after its checkpoint."""

    def __init__(self, directory: Path, run: RunConfig, update: int, new: bool) -> None:
        later = None if new else update + 1
        self._writer = SummaryWriter(
            str(directory / FOLDER),
            purge_step=later,
            filename_suffix=f".{update:08d}",  # names are by the second, and would be overwritten
        )
        self.where = shlex.join(["tensorboard", "--logdir", str(directory.parent)])
        if new:
            lines = "\n".join(f"    {key} = {value!r}" for key, value in settings(run).items())
            self._writer.add_text("options", lines, 0)

    def figures(self, update: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, update)

    def text(self, update: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, update)

    def close(self, reason: str) -> None:
        self._writer.close()
