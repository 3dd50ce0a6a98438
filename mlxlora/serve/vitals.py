"""How an engine is: what it has counted, whether it is faulty, how long its answers take."""

import time
from dataclasses import dataclass

FAULT_SECONDS = 30.0  # that a fault is told as the state, unless the engine has worked since


@dataclass
class Counters:
    """Since the start; none ever decreases."""

    answers: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    restarts: int = 0


class Vitals:
    """Told by the engine what happens to it; whoever asks gets an answer, from any thread."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.last_fault = ""
        self._faulty_since: float | None = None  # on the monotonic clock
        self._seconds = 1.0  # that an answer takes, smoothed

    @property
    def faulty(self) -> bool:
        since = self._faulty_since
        return since is not None and time.monotonic() - since < FAULT_SECONDS

    def fault(self, error: Exception) -> None:
        """The engine failed and begins anew."""
        self.last_fault = f"{type(error).__name__}: {error}"[:400]
        self._faulty_since = time.monotonic()
        self.counters.restarts += 1

    def works(self) -> None:
        self._faulty_since = None

    def answered(self, prompt: int, cached: int, tokens: int) -> None:
        """An answer ended, perhaps cancelled: tokens of its prompt, those read before, its own."""
        self.counters.answers += 1
        self.counters.prompt_tokens += prompt
        self.counters.cached_tokens += cached
        self.counters.tokens += tokens

    def took(self, seconds: float) -> None:
        """An answer, however it ended, from its order to its end."""
        self._seconds += 0.1 * (seconds - self._seconds)

    def wait(self, ahead: float) -> int:
        """Seconds after which to ask again, with so many answers' time before one's own."""
        return min(60, max(1, round(self._seconds * ahead)))
