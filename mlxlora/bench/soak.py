"""A server under thousands of requests, of which a third vanish: does it stay whole?

Request number n is a function of the seed and n: adapter, prompt, length, sampling, streamed or
not, and whether its client leaves: while it still sends, while it waits, or in mid-stream. Two
halves of the same kind; after each, when nothing runs any more, the memory of the process is
looked at: what the second half adds, a server without end would add again and again. The server
is told to keep few prompts for the next ones: filling a large cache takes more than half a soak,
and would look like a leak.
"""

import asyncio
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxlora.bench.ask import CHAT, COMPLETIONS, Question, Refused, values
from mlxlora.bench.compare import Progress
from mlxlora.bench.job import OURS
from mlxlora.bench.load import prompt_of, together
from mlxlora.bench.served import prepare
from mlxlora.bench.servers import PROGRAMS, Program, Server, running, small_cache
from mlxlora.bench.serving import ServeOptions, check
from mlxlora.bench.wire import Address, BrokenAnswer, Connection, get

CLIENTS = 32
LEAVING = 1 / 3  # of the requests
PATIENCE = 60.0  # seconds without anything new, after which a request is stuck
MORE_MEMORY = 1.05  # after the second half, of what it was after the first
LOOKS = 20  # at the memory
LONGEST_REST = 5.0  # seconds that a refused client waits at most before the next request
ENOUGH = 50  # failures after which going on tells nothing new
SOAKED = replace(PROGRAMS[OURS], command=small_cache)
TOLD = 3  # failures that are told
FINISHED, CANCELLED, REFUSED, FAILED, STUCK = "finished", "cancelled", "refused", "failed", "stuck"


@dataclass(frozen=True)
class Visit:
    """One request, and when its client leaves."""

    question: Question
    sends: float = 1.0  # this share of the request's bytes
    waits: float | None = None  # seconds, then it is gone
    reads: int = 0  # so many parts of the answer, then it is gone; 0: all


@dataclass(frozen=True)
class Soak:
    """What became of the requests, and of the server."""

    seed: int
    requests: int
    seconds: float
    counts: Mapping[str, int]  # FINISHED, CANCELLED, ... -> requests
    failures: Sequence[str]  # what the first that failed said
    memory: Sequence[tuple[int, int]]  # (requests so far, bytes of the process)
    halves: Sequence[int]  # bytes after each half, when nothing ran
    left: int  # requests that the server still counted when no client was there
    healthy: bool  # at the end

    @property
    def growth(self) -> float:
        """Memory after the second half, of that after the first; 1 where it is not told."""
        first, second = (*self.halves, 0, 0)[:2]
        return second / first if first and second else 1.0

    @property
    def faults(self) -> list[str]:
        """Why this is no pass; [] for a pass."""
        found = []
        if not self.healthy:
            found.append("the server was not healthy at the end")
        for kind in (STUCK, FAILED):
            if self.counts.get(kind):
                found.append(f"{self.counts[kind]} requests {kind}")
        if self.left:
            found.append(f"the server still counted {self.left} requests, without any client")
        if self.growth > MORE_MEMORY:
            more = 100 * (self.growth - 1)
            found.append(f"memory was {more:.1f} % larger after the second half than the first")
        return found

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "growth": self.growth, "faults": self.faults}


def soak(
    model: str,
    shape: str,
    rank: int,
    requests: int,
    seed: int,
    progress: Progress,
    program: Program = SOAKED,
) -> Soak:
    """Start a server for the model, or else the shape, with four adapters, and send it requests.

    Raises ConfigError for an unknown shape, BenchError if the server does not start, or ends.
    """
    check(ServeOptions(model=model, shape=shape))
    with tempfile.TemporaryDirectory() as directory:
        given, _ = prepare(model, shape, 0, rank, Path(directory))
        with running(OURS, program, given) as server:
            report = asyncio.run(_Soaking(server, requests, seed, progress).run())
            server.check()
            return report


@dataclass
class _Soaking:
    server: Server
    requests: int
    seed: int
    progress: Progress
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)

    async def run(self) -> Soak:
        address = self.server.address
        models = await served_by(address)
        began = time.monotonic()
        halves, left = [], 0
        middle = self.requests // 2
        for numbers in (range(middle), range(middle, self.requests)):
            rest = iter(numbers)
            await together((self._client(rest, models) for _ in range(CLIENTS)), None)
            left = await still_counted(address)
            halves.append(self.server.resident())
        return Soak(
            self.seed,
            self.requests,
            time.monotonic() - began,
            dict(self.counts),
            self.failures,
            self.memory,
            halves,
            left,
            await healthy(address),
        )

    async def _client(self, numbers: Iterator[int], models: Sequence[str]) -> None:
        for number in numbers:
            if self.counts[FAILED] + self.counts[STUCK] >= ENOUGH:
                return
            rest = 0.0
            try:
                outcome = await pay(self.server.address, visit(self.seed, number, models))
            except Refused as error:
                outcome, rest = (REFUSED if error.status == 429 else FAILED), error.seconds
                self._remember(outcome, number, error)
            except (BrokenAnswer, OSError) as error:
                outcome = FAILED
                self._remember(outcome, number, error)
            self.counts[outcome] += 1
            self._look()
            await asyncio.sleep(min(rest, LONGEST_REST))

    def _remember(self, outcome: str, number: int, error: Exception) -> None:
        if outcome == FAILED and len(self.failures) < TOLD:
            self.failures.append(f"request {number}: {error}")

    def _look(self) -> None:
        done = self.counts.total()
        if done % max(1, self.requests // LOOKS) == 0:
            self.memory.append((done, self.server.resident()))
            self.progress("requests", done, self.requests)


def visit(seed: int, number: int, models: Sequence[str]) -> Visit:
    """Request number n of this seed."""
    draw = random.Random(f"{seed} {number}")
    text = _prompt(draw)
    chat = draw.random() < 0.5
    body: dict[str, Any] = {
        "model": draw.choice(models),
        "max_tokens": draw.randint(1, 64),
        "stream": draw.random() < 0.5,
        **({"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}),
        **_sampling(draw),
    }
    leaves: dict[str, Any] = {}
    if draw.random() < LEAVING:
        kind = draw.choice(("sends", "waits", "reads"))
        share = draw.random()
        leaves = {kind: {"sends": share, "waits": share / 4, "reads": 1 + int(20 * share)}[kind]}
        body["stream"] |= kind == "reads"
    return Visit(Question(number, CHAT if chat else COMPLETIONS, body), **leaves)


def _prompt(draw: random.Random) -> str:
    """A few begin alike, as those of one application do."""
    shared = prompt_of(draw.randrange(4)) * 2 if draw.random() < 0.5 else ""
    own = prompt_of(draw.getrandbits(40))
    return shared + (own * 4)[: min(200, max(1, round(draw.lognormvariate(3.5, 1))))]


def _sampling(draw: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"temperature": draw.choice((0, 0.5, 1, 1.5))}
    choices: dict[str, Any] = {
        "top_p": draw.uniform(0.1, 1),
        "top_k": draw.randint(1, 50),
        "min_p": draw.uniform(0, 0.2),
        "seed": draw.getrandbits(31),
        "presence_penalty": draw.uniform(-1, 1),
        "frequency_penalty": draw.uniform(-1, 1),
        "repetition_penalty": draw.uniform(1, 1.3),
        "stop": ["".join(draw.choices("abcde", k=2))],
    }
    return found | {name: value for name, value in choices.items() if draw.random() < 0.2}


async def pay(address: Address, one: Visit) -> str:
    """Make the visit; returns FINISHED, CANCELLED or STUCK.

    Raises Refused, BrokenAnswer or OSError for an answer that is none.
    """
    try:
        async with asyncio.timeout(one.waits) as leaving:
            return await _stay(address, one)
    except TimeoutError:
        return CANCELLED if leaving.expired() else STUCK


async def _stay(address: Address, one: Visit) -> str:
    arrivals = _arrivals(address, one)
    seen, reason = 0, ""
    try:
        while True:
            async with asyncio.timeout(PATIENCE):
                value = await anext(arrivals, None)
            if value is None:
                break
            seen += 1
            if seen == one.reads:
                return CANCELLED
            for choice in value.get("choices") or ():
                reason = choice.get("finish_reason") or reason
    finally:
        await arrivals.aclose()
    if one.sends < 1:
        return CANCELLED
    if not reason:
        raise BrokenAnswer("the answer ended without a reason why")
    return FINISHED


async def _arrivals(address: Address, one: Visit) -> AsyncGenerator[dict[str, Any], None]:
    async with Connection(address) as connection:
        await connection.send("POST", one.question.path, one.question.body, one.sends)
        if one.sends < 1:
            return
        async for value in values(await connection.reply()):
            yield value


async def served_by(address: Address) -> list[str]:
    """The names of all that it serves."""
    _, body = await get(address, "/v1/models")
    return [model["id"] for model in json.loads(body)["data"]]


async def healthy(address: Address) -> bool:
    try:
        async with asyncio.timeout(PATIENCE):
            status, _ = await get(address, "/health")
    except (OSError, BrokenAnswer):  # TimeoutError is an OSError
        return False
    return status == 200


async def still_counted(address: Address, seconds: float = PATIENCE) -> int:
    """Requests that the server's metrics count although no client is there any more.

    They may take some seconds to be noticed; 0 where there are no metrics.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            _, body = await get(address, "/metrics")
        except (OSError, BrokenAnswer):
            return 0
        gauges = re.findall(r"^mlxlora_(?:running|waiting) (\d+)", body.decode(), re.MULTILINE)
        left = sum(map(int, gauges))
        if not left or time.monotonic() > until:
            return left
        await asyncio.sleep(0.05)
