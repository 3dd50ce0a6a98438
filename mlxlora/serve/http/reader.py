"""What may take its time with a request, done beside the event loop, one at a time.

Templates and tokenizers are not made to be used by several threads, so there is one. A thread
cannot be stopped: where a request holds it too long, the request is refused, the thread is left
to itself, and another one goes on with those that waited. (Schemas are followed elsewhere, where
they can be stopped: serve/grammar/.)
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar, cast

from mlxlora.serve.wire.refusals import WireError

T = TypeVar("T")
LONGEST = 30.0  # seconds; the first grammar of a large vocabulary takes a few


class Reader:
    """Reads requests, each in the order in which it came."""

    def __init__(self, longest: float = LONGEST) -> None:
        self._longest = longest
        self._worker = _Worker()

    async def __call__(self, what: Callable[[], T]) -> T:
        """Return what() or raise what it raises. Raises WireError if it takes too long."""
        while True:
            worker, job = self._worker, _Job(what, asyncio.get_running_loop())
            worker.jobs.put(job)
            try:
                if await self._done(worker, job):
                    return cast(T, job.future.result())
            finally:
                job.future.cancel()  # nobody waits for it any more

    async def _done(self, worker: "_Worker", job: "_Job") -> bool:
        """Whether the job came to its end; False if its thread is held by another job."""
        while True:
            left = self._longest
            if job.begun is not None:
                left += job.begun - time.monotonic()
            if left <= 0:
                self._leave(worker)
                raise WireError(
                    400, f"reading this request took longer than {self._longest:g} s; ask for less"
                )
            done, _ = await asyncio.wait([job.future], timeout=left)
            if done or (job.begun is None and worker is not self._worker):
                return bool(done)

    def _leave(self, worker: "_Worker") -> None:
        if worker is self._worker:
            self._worker = _Worker()
            worker.jobs.put(None)  # if it comes to an end after all


class _Job:
    """Something to be done, and the future of who waits for it."""

    def __init__(self, what: Callable[[], object], loop: asyncio.AbstractEventLoop) -> None:
        self.what, self.loop = what, loop
        self.future: asyncio.Future[object] = loop.create_future()
        self.begun: float | None = None  # by time.monotonic()

    def do(self) -> None:
        self.begun = time.monotonic()
        try:
            result, error = self.what(), None
        except BaseException as fault:  # it belongs to whoever waits
            result, error = None, fault
        # The server may have ended meanwhile, and its loop with it.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._tell, result, error)

    def _tell(self, result: object, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class _Worker:
    """A thread that does jobs until it is told None; a daemon, for it may never end."""

    def __init__(self) -> None:
        self.jobs: queue.Queue[_Job | None] = queue.Queue()
        threading.Thread(target=self._run, name="reader", daemon=True).start()

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            if not job.future.cancelled():
                job.do()
