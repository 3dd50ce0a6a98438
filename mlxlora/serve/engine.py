"""The engine: one thread owns the model; orders of any adapters come in, events go out.

Orders wait in a queue of limited length, then are decoded together, as many as the memory for
keys and values allows. What goes wrong in one order ends that order. What goes wrong in the
batch ends those in flight, with an error that says so; the engine then begins anew with the next.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from secrets import randbits
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxlora.base import Base
from mlxlora.errors import DataError
from mlxlora.lora.adapter import Adapter
from mlxlora.machine import prefill_tokens
from mlxlora.memory import limits
from mlxlora.serve.batch.adapters import Adapters, Served, content
from mlxlora.serve.batch.answer import Answer
from mlxlora.serve.batch.lane import Finished, Lane
from mlxlora.serve.batch.prefixes import Prefixes
from mlxlora.serve.batch.room import room_for
from mlxlora.serve.batch.rows import Row, Rows, Tagged
from mlxlora.serve.batch.together import together
from mlxlora.serve.grammar.following import Grammars
from mlxlora.serve.orders import Busy, Order, Sink
from mlxlora.serve.vitals import Vitals

IDLE_SECONDS = 3600.0  # to wait for work; the thread wakes for whatever comes


@dataclass(frozen=True)
class Options:
    """What the engine may use. None: as much as suits this machine."""

    rows: int = 32  # answers decoded together
    waiting: int = 128  # orders that may wait beside them
    slots: int = 8  # adapters in the mixed batch
    prefixes: int | None = None  # bytes of prompts that are kept for the next one
    context: int | None = None  # tokens of prompt and answer together
    prefill: int | None = None  # tokens of a prompt between two tokens of the others


class Ticket:
    """An order that was taken."""

    def __init__(self, engine: "Engine", answer: Answer) -> None:
        self._engine, self._answer = engine, answer

    def cancel(self) -> None:
        """The answer is not wanted any more; from any thread, any number of times."""
        self._engine._cancel(self._answer)


class Engine:
    """Start it, submit orders from any thread, stop it."""

    def __init__(
        self,
        base: Base,
        adapters: Mapping[str, Adapter] | None = None,
        options: Options | None = None,
        *,
        force: bool = False,
    ) -> None:
        """Raises AdapterError for an adapter that does not fit, unless only its base differs and
        force is True; ModelError for a model whose caches cannot be batched."""
        self.base, self.options = base, options or Options()
        self.vitals = Vitals()
        self.grammars = Grammars(base.tokenizer)
        self._rows = Rows()
        self._adapters = Adapters(base, self._rows, max(self.options.slots, len(adapters or ())))
        self._tagged = Tagged(base.model, self._rows)
        self._lanes: dict[str, Lane] = {}  # by the adapter's content; "" the mixed one
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._waiting: deque[Answer] = deque()
        self._running = 0
        self._taken = 0  # waiting and running
        self._lock = threading.Lock()
        self._stopping = False
        self._began: dict[Answer, float] = {}
        self.room = room_for(base, self.options.prefixes, self.options.context)
        self.together = together(base, self.options.rows)
        self._prefixes = Prefixes(self.room.prefixes)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=_run, args=([self],), name="engine", daemon=True)
        for name, adapter in (adapters or {}).items():
            self._adapters.load(name, adapter, force=force)

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End what is in flight, honestly, and the thread."""
        with self._lock:
            self._stopping = True
            self._inbox.put(lambda: None)
        if self._thread.ident is not None:
            self._ended.wait()
        self.grammars.close()

    @property
    def names(self) -> dict[str, Served]:
        """The adapters in service."""
        return self._adapters.named

    def submit(self, order: Order, sink: Sink) -> Ticket:
        """Take an order; sink gets its events, in the engine's thread.

        max_tokens is cut to what is left of the context. Raises Busy if too many wait, Unknown
        for an adapter that is not in service, DataError for a prompt that is empty or fills the
        context. A grammar that cannot be followed, its answer's Fault tells of.
        """
        served = self._adapters.get(order.adapter)
        room = self.room.context - len(order.prompt)
        if not order.prompt or room < 1:
            raise DataError(
                f"a prompt has 1 to {self.room.context - 1:,} tokens, not {len(order.prompt):,}"
            )
        order = replace(order, max_tokens=min(order.max_tokens, room))
        seed = order.sampling.seed
        row = Row(served.slot, order.sampling, randbits(32) if seed is None else _folded(seed))
        grammar = None
        if order.grammar is not None:
            grammar = self.grammars.grammar(order.grammar, len(order.prompt))
        answer = Answer(order, sink, served, row, self.base.tokenizer, grammar)
        with self._lock:
            self._check_room(1)
            self._taken += 1
            self._inbox.put(lambda: self._take(answer))
        return Ticket(self, answer)

    def check_room(self, count: int) -> None:
        """Raise Busy if so many more orders would not be taken now."""
        with self._lock:
            self._check_room(count)

    def _check_lives(self) -> None:
        """With the lock, so that the thread still does what is asked of it then."""
        if self._stopping:
            raise Busy("the server is shutting down", 5)

    def _check_room(self, count: int) -> None:
        self._check_lives()
        if self._taken + count > self.together.rows + self.options.waiting:
            self.vitals.counters.refused += 1
            raise Busy(
                f"{self._taken} requests are being answered or wait already",
                self.vitals.wait(self._taken / self.together.rows),
            )

    def load(self, name: str, adapter: Adapter, *, force: bool = False) -> None:
        """Take one more adapter into service; others go on.

        Raises AdapterError, or Busy of an engine that was stopped.
        """
        key = content(adapter)  # which takes a while, and others are being answered
        self._ask(lambda: self._adapters.load(name, adapter, key, force=force))

    def unload(self, name: str) -> None:
        """Take an adapter out of service; answers in the making are completed. Raises Unknown."""
        self._ask(lambda: self._adapters.unload(name))

    def health(self) -> dict[str, Any]:
        """What a look from outside should see; "status" is "ok" or what is wrong."""
        status = "faulty" if self.vitals.faulty else "ok"
        if self._thread.ident is None or self._ended.is_set():
            status = "stopped"
        return {
            "status": status,
            "running": self._running,
            "waiting": max(0, self._taken - self._running),
            "restarts": self.vitals.counters.restarts,
            "last_fault": self.vitals.last_fault or None,
            "adapters": sorted(self.names),
        }

    def kept(self) -> tuple[int, int]:
        """(prompts that are kept, their bytes)."""
        return len(self._prefixes), self._prefixes.size

    # In the engine's thread

    def _work(self) -> None:
        with limits(self.room.needed, self.room.weights):
            while not self._stopping:
                self._listen(wait=not self._taken)
                self._admit()
                for key, lane in list(self._lanes.items()):
                    self._advance(key, lane)
            self._end_all("the server is shutting down")
            self._adapters.stage.show(None)

    def _listen(self, wait: bool) -> None:
        """Do what was asked for meanwhile."""
        while True:
            try:
                asked = self._inbox.get(wait, IDLE_SECONDS) if wait else self._inbox.get_nowait()
            except Empty:
                return
            wait = False
            try:
                asked()
            except Exception as error:  # a fault of ours, but the thread must live
                logging.getLogger(__name__).error("the engine stumbled", exc_info=error)

    def _take(self, answer: Answer) -> None:
        served = answer.served
        self._began[answer] = time.monotonic()
        served.users += 1
        if served.leaving and served.users == 1:  # unloaded since: its slot may be another's
            answer.fail(f"the adapter {served.name!r} was unloaded meanwhile", ours=False)
            self._settle(answer)
            return
        self._waiting.append(answer)

    def _cancel(self, answer: Answer) -> None:
        answer.cancelled = True
        self._inbox.put(lambda: self._drop(answer))

    def _drop(self, answer: Answer) -> None:
        if answer.done:
            return
        self.vitals.counters.cancelled += 1
        if answer.uid is None:
            self._waiting.remove(answer)
            answer.cancel()
            self._settle(answer)
            return
        key = _lane(answer.served)
        lane = self._lanes[key]
        answer.cancel()
        try:
            finished = lane.remove(answer)
            self._running -= 1
            self._close(finished)
        except Exception as error:  # whatever it is, nobody shall be left in a batch that is none
            self._restart(key, lane, error)

    def _admit(self) -> None:
        """Begin as many waiting orders as there are rows and room for their keys and values."""
        need = max(map(_length, self._in_flight()), default=0)
        while self._waiting and self._running < self.together.rows:
            answer = self._waiting[0]
            need = max(need, _length(answer))
            if self._running and (self._running + 1) * need > self.room.tokens:
                return
            self._waiting.popleft()
            self._running += 1
            try:
                self._begin(answer)
            except Exception as error:  # whatever it is, it is this one's
                self._running -= 1
                self._fail(answer, f"it could not be begun: {type(error).__name__}: {error}")

    def _begin(self, answer: Answer) -> None:
        served = answer.served
        caches, answer.cached = self._prefixes.find(served.key, answer.order.prompt)
        key = _lane(served)
        if key not in self._lanes:
            self._lanes[key] = Lane(
                served.form,
                self._tagged,
                list(self.base.tokenizer.eos_token_ids),
                self.together,
                self.options.prefill or prefill_tokens(),
            )
        self._lanes[key].insert(answer, caches or make_prompt_cache(self.base.model))

    def _advance(self, key: str, lane: Lane) -> None:
        if not lane.answers:
            if lane.form is not None:  # nobody speaks to this adapter now
                del self._lanes[key]
            return
        try:
            self._adapters.stage.show(lane.form or self._adapters.mixed)
            for finished in lane.step():
                self._running -= 1
                self._close(finished)
            self.vitals.works()
        except Exception as error:  # whatever it is, the next ones shall be answered
            self._restart(key, lane, error)

    def _close(self, finished: Finished) -> None:
        answer, tokens, caches = finished
        self.vitals.answered(len(answer.order.prompt), answer.cached, answer.tokens)
        self._settle(answer)
        if caches and not answer.served.leaving:
            self._prefixes.keep(answer.served.key, tokens, caches)

    def _settle(self, answer: Answer) -> None:
        """Whatever became of it, it takes no place any more."""
        self.vitals.took(time.monotonic() - self._began.pop(answer))
        with self._lock:
            self._taken -= 1
        self._adapters.release(answer.served)
        answer.tell_last()

    def _restart(self, key: str, lane: Lane, error: Exception) -> None:
        """Fail what this lane has in flight; those that wait are answered by a new one."""
        logging.getLogger(__name__).error("the engine failed and begins anew", exc_info=error)
        self.vitals.fault(error)
        del self._lanes[key]
        self._prefixes.forget()
        mx.clear_cache()
        for answer in list(lane.answers.values()):
            self._running -= 1
            self._fail(
                answer,
                "the engine failed while this was being answered and has begun anew; "
                f"ask once more ({type(error).__name__})",
            )

    def _fail(self, answer: Answer, why: str) -> None:
        if not answer.done:
            self.vitals.counters.failed += 1
            answer.fail(why, ours=True)
        self._settle(answer)

    def _in_flight(self) -> list[Answer]:
        return [answer for lane in self._lanes.values() for answer in lane.answers.values()]

    def _end_all(self, why: str) -> None:
        self._listen(wait=False)
        for answer in [*self._in_flight(), *self._waiting]:
            answer.fail(why, ours=True)
            answer.tell_last()
        self._waiting.clear()
        self._lanes.clear()

    def _ask(self, what: Callable[[], Any]) -> Any:
        """Have it done in the engine's thread; its answer, or its error."""
        future: Future[Any] = Future()

        def do() -> None:
            try:
                future.set_result(what())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self._check_lives()
            self._inbox.put(do)
        return future.result()


def _run(engines: list[Engine]) -> None:
    """The engine's thread. It outlives its engine, asleep, and ends with the process.

    MLX keeps things of each thread's own, and takes them down as the thread ends; while Python
    itself ends, that would abort the process.
    """
    engine = engines.pop()  # so that nothing here holds on to it
    ended = engine._ended
    try:
        engine._work()
    finally:
        del engine
        ended.set()
    threading.Event().wait()


def _lane(served: Served) -> str:
    return "" if served.form is None else served.key


def _length(answer: Answer) -> int:
    return len(answer.order.prompt) + answer.order.max_tokens


def _folded(seed: int) -> int:
    """Any integer as 32 bits that tell neighbours apart (Knuth's multiplicative hash)."""
    return (seed ^ (seed >> 32)) * 2654435761 & 0xFFFFFFFF
