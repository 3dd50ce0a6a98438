"""Weights & Biases. WANDB_PROJECT, WANDB_MODE=offline and its other variables count as ever."""

import html
import os
import uuid
from pathlib import Path

import wandb

from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError
from mlxlora.track.figures import settings
from mlxlora.track.known import known

STEP = "update"


def ready() -> None:
    """Ask for a login while there is no display yet. Raises ConfigError without one."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    try:
        logged_in = wandb.login()
    except wandb.Error as error:
        raise _no_login(str(error)) from error
    if not logged_in:
        raise _no_login("not logged in")


def _no_login(why: str) -> ConfigError:
    return ConfigError(f"--track wandb: {why}. Run wandb login, or set WANDB_MODE=offline.")


class WeightsAndBiases:
    """One run there for one run here, also when it is resumed."""

    def __init__(self, directory: Path, run: RunConfig, update: int, new: bool) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mlxlora"),
            name=directory.name,
            id=known(directory, "wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            config=settings(run),
            dir=str(directory),
            settings=wandb.Settings(silent=True),
        )
        # Updates that are made again after a resume come with numbers that were there before,
        # which wandb's own step does not allow.
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        self.where = self._run.url or str(directory / "wandb")

    def figures(self, update: int, values: dict[str, float]) -> None:
        self._run.log({**values, STEP: update})

    def text(self, update: int, name: str, text: str) -> None:
        page = f"<pre>{html.escape(text)}</pre>"
        self._run.log({name: wandb.Html(page, inject=False), STEP: update})

    def close(self, reason: str) -> None:
        self._run.summary["ended"] = reason
        self._run.finish(exit_code=1 if reason == "failed" else 0)
