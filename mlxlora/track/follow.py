"""tracked(events): the events of a run, passed on unchanged, and told to trackers on the way.

A tracker is a file here and a line in TRACKERS. One that fails is let go of: what a run learns is
worth more than its curve somewhere else.
"""

import importlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mlxlora.config import RunConfig
from mlxlora.errors import ConfigError
from mlxlora.readers import expanded
from mlxlora.track.figures import figures
from mlxlora.train.events import Done, Event, Resumed, Sample, Start
from mlxlora.train.places import CONFIG

# --track NAME -> module, class. The extra to install has the same name.
TRACKERS = {
    "tensorboard": ("mlxlora.track.tensorboard", "TensorBoard"),
    "wandb": ("mlxlora.track.wandb", "WeightsAndBiases"),
    "mlflow": ("mlxlora.track.mlflow", "Mlflow"),
}


class Tracker(Protocol):
    """Told of a run: made with (its directory, its options, the update it begins after, new)."""

    where: str  # to look at it

    def figures(self, update: int, values: dict[str, float]) -> None: ...

    def text(self, update: int, name: str, text: str) -> None: ...

    def close(self, reason: str) -> None:
        """reason: Done's, or "failed"."""


Open = Callable[[Path, RunConfig, int, bool], Tracker]


def check(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that cannot be told anything, before training."""
    for name in names:
        module = _module(name)
        if ready := getattr(module, "ready", None):
            ready()


def tracked(
    events: Iterator[Event],
    directory: str | Path,
    names: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Event]:
    """Yield the events of train() or resume() for this directory; tell the trackers.

    say is told where to look, and of trackers that failed. Raises ConfigError as check() does.
    """
    openers = {name: _opener(name) for name in dict.fromkeys(names)}
    trackers: _Trackers | None = None
    started = False
    reason = "failed"
    try:
        for event in events:
            if started and trackers is None:
                trackers = _Trackers(openers, expanded(directory), event, say)
            started = started or isinstance(event, Start)
            if trackers is not None:
                trackers.tell(event)
            if isinstance(event, Done):
                reason = event.reason
            yield event
    except (KeyboardInterrupt, GeneratorExit):
        reason = "interrupted"
        raise
    finally:
        if trackers is not None:
            trackers.close(reason)


class _Trackers:
    """Those that still work."""

    def __init__(
        self, openers: dict[str, Open], directory: Path, first: Event, say: Callable[[str], None]
    ) -> None:
        """first: the event after Start, which tells whether the run is resumed."""
        self._say = say
        self._open: dict[str, Tracker] = {}
        run = RunConfig.load(directory / CONFIG)
        resumed = isinstance(first, Resumed)
        begun = first.update if isinstance(first, Resumed) else 0
        for name, make in openers.items():
            try:
                self._open[name] = tracker = make(directory, run, begun, not resumed)
            except Exception as error:
                self._lost(name, error)
            else:
                say(f"{name}: {tracker.where}")

    def tell(self, event: Event) -> None:
        if isinstance(event, Sample):
            title = f"answers/{textwrap.shorten(event.prompt, 60, placeholder='…')}"
            self._each(lambda tracker: tracker.text(event.update, title, event.text))
        elif values := figures(event):
            update = getattr(event, "update", 0)
            self._each(lambda tracker: tracker.figures(update, values))

    def close(self, reason: str) -> None:
        self._each(lambda tracker: tracker.close(reason))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                do(tracker)
            except Exception as error:
                del self._open[name]
                self._lost(name, error)

    def _lost(self, name: str, error: Exception) -> None:
        words = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder="…")
        self._say(f"{name} is no longer told of this run ({words}); training goes on")


def _opener(name: str) -> Open:
    opener: Open = getattr(_module(name), TRACKERS[name][1])
    return opener


def _module(name: str) -> object:
    if name not in TRACKERS:
        raise ConfigError(f"--track {name[:40]!r}: choose from {', '.join(TRACKERS)}")
    try:
        return importlib.import_module(TRACKERS[name][0])
    except ImportError as error:
        raise ConfigError(
            f"--track {name}: {error}. It is an extra: pip install 'mlxlora[{name}]'"
        ) from error
