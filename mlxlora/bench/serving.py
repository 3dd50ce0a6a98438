"""Both servers in alternation, each in a fresh process, under the same questions.

A round goes through the numbers of clients; for each, every server is started, asked, ended, the
first to go changing from round to round, and ratios are taken within a round. When a server is
started, all adapters are asked one question at once: the answers warm it up, and they must be
those of the other server before any speed is reported. mlx_lm.server reads the model again for
each change of adapter, so a setting may run into its limit of time; then its rates are those so
far, and the server is started anew, since it would go on with what nobody waits for.
"""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxlora.bench.ask import Answer, Refused
from mlxlora.bench.compare import AGAINST, BITS, BenchError, Progress
from mlxlora.bench.job import MLX_LM, OURS, Model
from mlxlora.bench.load import Measured, Setting, load
from mlxlora.bench.rates import MIXED, ONE, STREAM, Round, Serving
from mlxlora.bench.served import ADAPTERS, Given, prepare
from mlxlora.bench.servers import PROGRAMS, Program, Server, running
from mlxlora.bench.shapes import SHAPES
from mlxlora.bench.wire import BrokenAnswer
from mlxlora.errors import ConfigError

LEAST_REQUESTS = 8  # of a setting
STREAM_REQUESTS = 3
APART = 1_000_000  # between the numbers of two settings' questions
PROBE_TOKENS, WARM_TOKENS = 16, 4
PROBE_SECONDS = 600.0
# Answers that may differ between the sides, of all: in float32 none; else rounding decides where
# two tokens are almost as likely.
EXACT, ROUNDED = 0.0, 0.5
MORE_TOKENS = 0.02  # relative difference of the tokens that both sides generated


@dataclass(frozen=True)
class ServeOptions:
    """What to measure."""

    model: str = ""  # directory or Hub id; "" for the shape
    shape: str = "mini"
    bits: int = 0
    rank: int = 8
    against: str = MLX_LM
    rounds: int = 3
    clients: tuple[int, ...] = (1, 8, 32)  # at once
    requests: int = 4  # of each client, in each setting
    tokens: int = 32  # of an answer
    stream_tokens: int = 128  # of an answer to the only client
    limit: float = 60.0  # seconds that a setting may take

    @property
    def sides(self) -> tuple[str, ...]:
        return (OURS,) if self.against == "none" else (self.against, OURS)


def bench_serving(
    options: ServeOptions,
    progress: Progress,
    programs: Mapping[str, Program] = PROGRAMS,
) -> Serving:
    """Measure. Raises ConfigError for options that cannot be, BenchError if a server fails or
    the two do not answer alike.
    """
    check(options)
    with tempfile.TemporaryDirectory() as directory:
        model = (options.model, options.shape, options.bits, options.rank)
        given, about = prepare(*model, Path(directory))
        return _measure(options, progress, programs, given, about)


def check(options: ServeOptions) -> None:
    """Raise ConfigError for a name or a number that cannot be measured."""
    if options.shape not in SHAPES:
        raise ConfigError(f"--shape must be one of {', '.join(SHAPES)}, not {options.shape!r}")
    if options.against not in AGAINST:
        raise ConfigError(f"--against must be mlx-lm or none, not {options.against!r}")
    if options.bits not in BITS:
        raise ConfigError(f"--bits must be 0, 4 or 8, not {options.bits}")
    if options.model and options.bits:
        raise ConfigError("--bits is for --shape; a --model is served as it is")
    if not options.clients or min(options.clients) < 1:
        raise ConfigError("--clients must be whole numbers from 1, such as 1,8,32")


def settings_of(options: ServeOptions) -> list[list[Setting]]:
    """Those that one start of a server goes through, for each number of clients."""
    stream = Setting(STREAM, 1, ADAPTERS[:1], STREAM_REQUESTS, options.stream_tokens, 0)
    groups: list[list[Setting]] = []
    for clients in dict.fromkeys(options.clients):
        count = max(LEAST_REQUESTS, options.requests * clients)
        own = (clients, count, options.tokens)
        pair = [_setting(ONE, ADAPTERS[:1], *own), _setting(MIXED, ADAPTERS, *own)]
        groups.append([*([] if groups else [stream]), *pair])
    numbers = iter(range(0, APART * 3 * len(groups), APART))
    return [[replace(one, start=next(numbers)) for one in group] for group in groups]


def _setting(
    key: str, adapters: tuple[str, ...], clients: int, requests: int, tokens: int
) -> Setting:
    return Setting(key, clients, adapters, requests, tokens, start=0)


def _measure(
    options: ServeOptions,
    progress: Progress,
    programs: Mapping[str, Program],
    given: Given,
    about: Model,
) -> Serving:
    groups = settings_of(options)
    rounds: dict[str, list[Round]] = {side: [] for side in options.sides}
    same = None
    total, done = options.rounds * len(groups) * len(options.sides), 0
    for number in range(options.rounds):
        found: dict[str, dict[tuple[str, int], Measured]] = {side: {} for side in options.sides}
        for group in groups:
            probes = {}
            for side in options.sides if number % 2 == 0 else options.sides[::-1]:
                progress(f"{group[-1].clients} clients, {side}", done, total)
                start = _Start(side, programs[side], given, options.limit)
                probes[side], seen = start.measure(group)
                found[side] |= {(one.setting.key, one.setting.clients): one for one in seen}
                done += 1
            same = agree(probes, about.dtype) or same
            agree_on_tokens(found)
        for side in options.sides:
            rounds[side].append(found[side])
    return Serving(about, options.rank, options.against, options.limit, same, rounds)


@dataclass(frozen=True)
class _Start:
    """A server that is started for a group of settings."""

    side: str
    program: Program
    given: Given
    limit: float

    def measure(self, group: Sequence[Setting]) -> tuple[list[Answer], list[Measured]]:
        """(one answer of each adapter, what was seen in each setting)."""
        probes: list[Answer] = []
        found: list[Measured] = []
        while len(found) < len(group):
            with running(self.side, self.program, self.given) as server:
                probe = Setting("", len(ADAPTERS), ADAPTERS, len(ADAPTERS), PROBE_TOKENS, -APART)
                answers = self._load(server, probe, PROBE_SECONDS).answers
                probes = sorted(answers, key=lambda answer: answer.number)
                while len(found) < len(group):
                    setting = group[len(found)]
                    self._load(server, warm_up(setting), PROBE_SECONDS)
                    found.append(self._load(server, setting, self.limit))
                    if not found[-1].complete:
                        break
        return probes, found

    def _load(self, server: Server, setting: Setting, limit: float) -> Measured:
        def fields(adapter: str) -> dict[str, str]:
            return self.program.fields(self.given, adapter)

        seen = answered(server, lambda: load(server.address, setting, fields, limit))
        if not seen.answers:
            raise BenchError(
                f"{self.side} answered none of {setting.requests} requests in {limit:.0f} s "
                f"({setting.key or 'to warm up'}, clients: {setting.clients}); a smaller --shape "
                "or a larger --limit helps"
            )
        return seen


def warm_up(setting: Setting) -> Setting:
    """One short question of the first adapter, which mlx_lm.server then has at hand."""
    start = setting.start + APART // 2
    return replace(setting, clients=1, requests=1, max_tokens=WARM_TOKENS, start=start)


def answered(server: Server, asking: Callable[[], Coroutine[Any, Any, Measured]]) -> Measured:
    """What asking finds; requests that fail become a BenchError with the server's last words."""
    try:
        return asyncio.run(asking())
    except (Refused, BrokenAnswer, OSError) as error:
        server.check()
        raise BenchError(
            f"a request to {server.name} failed: {error}\n{server.last_words()}".rstrip()
        ) from error


def agree(probes: Mapping[str, Sequence[Answer]], dtype: str) -> tuple[int, int] | None:
    """(how many adapters both sides answered alike with, how many there are).

    None without another side. Raises BenchError if too many differ, or if adapters answer alike.
    """
    texts = {side: [answer.text for answer in answers] for side, answers in probes.items()}
    for side, found in texts.items():
        if len(set(found)) < len(found):
            raise BenchError(f"{side} answered alike with different adapters: {found[0]!r}")
    if len(texts) == 1:
        return None
    one, other = texts.values()
    alike = sum(a == b for a, b in zip(one, other, strict=True))
    if len(one) - alike > len(one) * (EXACT if dtype == "float32" else ROUNDED):
        a, b = next((a, b) for a, b in zip(one, other, strict=True) if a != b)
        raise BenchError(
            "the two servers do not answer alike, so their speeds are not reported.\n"
            f"With an adapter, greedily: {' and '.join(probes)} answered {a!r} and {b!r}."
        )
    return alike, len(one)


def agree_on_tokens(found: Mapping[str, Mapping[tuple[str, int], Measured]]) -> None:
    """Raise BenchError unless the questions that all sides answered cost them the same tokens."""
    if len(found) == 1:
        return
    one, other = found.values()
    for key in one:
        sides = [{answer.number: answer for answer in side[key].answers} for side in (one, other)]
        common = sides[0].keys() & sides[1].keys()
        prompts = [sum(side[n].prompt_tokens for n in common) for side in sides]
        tokens = [sum(side[n].tokens for n in common) for side in sides]
        if prompts[0] != prompts[1] or abs(tokens[0] - tokens[1]) > MORE_TOKENS * tokens[1]:
            raise BenchError(
                f"the two servers did not do the same work ({key[0]}, clients: {key[1]}): "
                f"{' and '.join(found)} read {prompts[0]} and {prompts[1]} tokens and wrote "
                f"{tokens[0]} and {tokens[1]}, for {len(common)} questions"
            )
