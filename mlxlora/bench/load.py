"""Concurrent clients: each asks, reads its answer to the end, and asks again.

Questions are numbered, and a question's prompt and adapter are functions of its number, so all
servers get the same ones; no two are alike, so that no server saves work by remembering. The
next question goes to whichever client is free.
"""

import asyncio
import math
import random
import string
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from mlxlora.bench.ask import COMPLETIONS, Answer, Question, ask
from mlxlora.bench.wire import Address

SHORTEST, LONGEST = 32, 64  # characters of a prompt; of random shapes, each is a token
_LETTERS = string.ascii_lowercase + "     ,."


@dataclass(frozen=True)
class Setting:
    """What is asked of a server, and by how many at once."""

    key: str  # "one adapter", "adapters mixed" or "one stream"
    clients: int
    adapters: tuple[str, ...]  # taken in turns, question by question
    requests: int
    max_tokens: int
    start: int  # the number of the first question

    def adapter(self, number: int) -> str:
        return self.adapters[number % len(self.adapters)]


@dataclass(frozen=True)
class Measured:
    """What the clients of one setting saw."""

    setting: Setting
    answers: tuple[Answer, ...]  # those that were complete in time
    seconds: float  # from the first question to the last of these answers, or to the limit
    begun: int = 0  # pieces of text of answers that were not: each a token, or more

    @property
    def complete(self) -> bool:
        """False: time ran out, and the rates are those so far."""
        return len(self.answers) == self.setting.requests

    @property
    def requests_per_second(self) -> float:
        return len(self.answers) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated, all clients together."""
        return (sum(answer.tokens for answer in self.answers) + self.begun) / self.seconds

    @property
    def total_tokens_per_second(self) -> float:
        """Of prompts and answers."""
        prompts = sum(answer.prompt_tokens for answer in self.answers)
        return self.tokens_per_second + prompts / self.seconds

    @property
    def decoding_rate(self) -> float:
        """Of one answer, the median: tokens per second after its first."""
        return median(answer.decoding_rate for answer in self.answers)

    def wait(self, share: float) -> float:
        """Seconds to the first text that this share of the requests did not exceed."""
        return quantile([answer.wait for answer in self.answers], share)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share does not exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def prompt_of(number: int) -> str:
    """Letters, spaces and commas, the same for the same number."""
    draw = random.Random(number)
    return "".join(draw.choices(_LETTERS, k=draw.randint(SHORTEST, LONGEST - 1))) + "."


def question(setting: Setting, number: int, fields: Callable[[str], dict[str, str]]) -> Question:
    """fields: adapter -> what tells the server that it is meant."""
    body = {
        "prompt": prompt_of(number),
        "max_tokens": setting.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields(setting.adapter(number)),
    }
    return Question(number, COMPLETIONS, body)


async def load(
    address: Address, setting: Setting, fields: Callable[[str], dict[str, str]], limit: float
) -> Measured:
    """Ask all questions of a setting; those without an answer after limit seconds are given up.

    Raises Refused, BrokenAnswer or OSError for the first request that fails.
    """
    numbers = iter(range(setting.start, setting.start + setting.requests))
    answers: list[Answer] = []
    pieces = Counter[int]()  # of text, by question, while its answer is not complete

    async def client() -> None:
        for number in numbers:
            heard = partial(pieces.update, (number,))
            answers.append(await ask(address, question(setting, number, fields), heard))
            del pieces[number]

    began = time.perf_counter()
    await together([client() for _ in range(setting.clients)], limit)
    ended = time.perf_counter()
    if len(answers) == setting.requests:
        ended = max(answer.ended for answer in answers)
    return Measured(setting, tuple(answers), ended - began, pieces.total())


async def together(clients: Iterable[Coroutine[Any, Any, None]], limit: float | None) -> None:
    """Run clients until all are done or one fails, which is raised, or limit seconds are over."""
    tasks = [asyncio.create_task(client) for client in clients]
    try:
        done, _ = await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
