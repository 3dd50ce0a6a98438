"""bench --serve: what clients send and see, what servers are compared by, what a soak notices."""

import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given as any_of
from hypothesis import strategies as some
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import load as mlx_lm_load
from scripted_server import Scripted
from typer.testing import CliRunner

from mlxlora.base import load as load_base
from mlxlora.bench import ask as asking
from mlxlora.bench import soak as soaking
from mlxlora.bench.ask import CHAT, COMPLETIONS, Answer, Question, Refused, ask, listen
from mlxlora.bench.compare import BenchError
from mlxlora.bench.job import MLX_LM, OURS, Model
from mlxlora.bench.load import Measured, Setting, load, prompt_of, quantile
from mlxlora.bench.rates import MIXED, ONE, STREAM, Serving
from mlxlora.bench.served import ADAPTERS, END, Given, prepare
from mlxlora.bench.servers import PROGRAMS, Program, running
from mlxlora.bench.serving import (
    ServeOptions,
    agree,
    agree_on_tokens,
    bench_serving,
    check,
    settings_of,
)
from mlxlora.bench.show_serving import show_serving, show_soak
from mlxlora.bench.soak import CANCELLED, FINISHED, STUCK, Soak, Visit, pay, soak, visit
from mlxlora.bench.wire import BrokenAnswer, Events, get
from mlxlora.cli import app
from mlxlora.console import Screen
from mlxlora.errors import ConfigError

MODEL = Model("tiny", 106_944, "float32", 0, "a machine")
SCRIPT = Path(__file__).with_name("scripted_server.py")
LONG = 60.0  # seconds: a test that waits so long has failed


def program(**script) -> Program:
    """The scripted server as a program."""
    words = [sys.executable, str(SCRIPT)]
    return Program(lambda _, port: [*words, str(port), json.dumps(script)], PROGRAMS[OURS].fields)


def setting(key: str = MIXED, clients: int = 2, requests: int = 8, **more) -> Setting:
    return replace(Setting(key, clients, ADAPTERS, requests, 3, 0), **more)


def answer(number: int = 0, tokens: int = 10, wait: float = 1.0, **more) -> Answer:
    made = Answer(number, "x", "length", 5, tokens, 0.0, wait, wait + 1, wait + 2)
    return replace(made, **more)


def names(adapter: str) -> dict[str, str]:
    return {"model": adapter}


# What clients send and see.


def test_every_question_is_asked_once_by_so_many_clients_at_once_of_all_adapters_in_turns():
    async def run() -> tuple[Scripted, Measured]:
        server = Scripted(waits_for=3)
        async with server.listening() as address:
            return server, await load(address, setting(clients=3, requests=12), names, LONG)

    server, seen = asyncio.run(run())
    assert seen.complete and sorted(a.number for a in seen.answers) == list(range(12))
    assert Counter(body["model"] for body in server.asked) == dict.fromkeys(ADAPTERS, 3)
    assert server.most == 3
    assert {body["prompt"] for body in server.asked} == {prompt_of(n) for n in range(12)}
    assert all(body["stream"] and body["temperature"] == 0 for body in server.asked)
    assert {(a.tokens, a.text.count("é")) for a in seen.answers} == {(3, 3)}
    assert all(a.asked <= a.first <= a.last <= a.ended for a in seen.answers)


def test_prompts_differ_and_are_the_same_every_time():
    prompts = [prompt_of(number) for number in range(500)]
    assert len(set(prompts)) == 500 and prompts == [prompt_of(number) for number in range(500)]
    assert all(32 <= len(prompt) <= 64 for prompt in prompts)


def test_a_setting_whose_time_runs_out_keeps_what_was_answered():
    async def run() -> Measured:
        async with Scripted(silent_after=5).listening() as address:
            return await load(address, setting(clients=2), names, 0.5)

    seen = asyncio.run(run())
    assert not seen.complete and len(seen.answers) == 5
    assert seen.seconds >= 0.5 and seen.tokens_per_second == 15 / seen.seconds


def test_what_had_come_of_answers_that_time_cut_off_counts_as_generated():
    async def run() -> Measured:
        async with Scripted(holds_after=2).listening() as address:
            return await load(address, setting(clients=2), names, 0.5)

    seen = asyncio.run(run())
    assert (seen.answers, seen.begun) == ((), 4)
    assert seen.tokens_per_second == 4 / seen.seconds and seen.requests_per_second == 0


def test_a_request_that_fails_ends_the_measurement():
    async def run() -> None:
        async with Scripted(fails=5).listening() as address:
            await load(address, setting(), names, LONG)

    with pytest.raises(Refused, match=r'status 500.*"broken"'):
        asyncio.run(run())


@any_of(some.data())
def test_events_are_the_same_wherever_their_bytes_are_cut(data):
    text = ': a comment\n\ndata: {"é": 1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\ndata: rest'
    stream = text.encode()
    borders = data.draw(some.sets(some.integers(1, len(stream) - 1)))
    cuts = [0, *sorted(borders), len(stream)]
    events = Events()
    found = [e for a, b in pairwise(cuts) for e in events.feed(stream[a:b])]
    assert found == ['{"é": 1}', "two\nlines"]


@pytest.mark.parametrize("cut", [1, 3, 10_000])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_the_same_whatever_its_form(cut, path, stream):
    body = {"model": "a", "max_tokens": 4, "stream": stream}
    body |= {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"content": "hi"}]}

    async def run() -> Answer:
        async with Scripted(cut=cut).listening() as address:
            return await ask(address, Question(0, path, body))

    found = asyncio.run(run())
    assert (found.prompt_tokens, found.tokens, found.reason) == (2, 4, "length")
    assert found.text == "".join(f"é{crc32(f'ahi{n}'.encode()):x} " for n in range(4))


@dataclass
class Told:
    """A reply whose pieces each take a second of the clock that stands beside it."""

    events: list[object]
    clock: float = 0.0
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream"})

    async def pieces(self):
        for event in self.events:
            self.clock += 1
            yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()


def delta(finish: str | None = None, **fields) -> dict:
    return {"choices": [{"delta": fields, "finish_reason": finish}]}


def test_the_first_token_is_the_first_text_and_not_the_role(monkeypatch):
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}
    told = Told(
        [
            delta(role="assistant", content=""),
            delta(reasoning="hm", reasoning_content="hm"),
            delta(content="a"),
            delta(content="b"),
            delta("stop"),
            usage,
            "[DONE]",
        ]
    )
    monkeypatch.setattr(asking.time, "perf_counter", lambda: told.clock)
    found = asyncio.run(listen(told, 3, asked=0.0))
    assert (found.first, found.last, found.ended) == (2, 4, 7)
    assert (found.text, found.reason, found.wait) == ("hmab", "stop", 2)
    assert found.decoding_rate == 3 / 2


@pytest.mark.parametrize(
    ("events", "kind", "text"),
    [
        ([delta(content="a")], BrokenAnswer, r"without \[DONE\]"),
        ([delta(content="a"), "[DONE]"], BrokenAnswer, "without a reason why"),
        ([{"error": {"message": "lost"}}, "[DONE]"], Refused, "mid-stream.*lost"),
        (["half of {"], BrokenAnswer, "no JSON"),
        (["3"], BrokenAnswer, "no JSON object"),
    ],
)
def test_an_answer_that_is_none_is_told(events, kind, text):
    with pytest.raises(kind, match=text):
        asyncio.run(listen(Told(events), 0, 0.0))


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"no http",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab",
    ],
)
def test_an_answer_that_is_cut_off_is_told(sent):
    async def client(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(client, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await get(asking.Address("127.0.0.1", port), "/")

    with pytest.raises(BrokenAnswer):
        asyncio.run(run())


def test_a_body_without_a_length_ends_with_its_connection():
    async def client(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\nX: y\r\n\r\nall of it")
        writer.close()

    async def run() -> tuple[int, bytes]:
        async with await asyncio.start_server(client, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await get(asking.Address("127.0.0.1", port), "/")

    assert asyncio.run(run()) == (200, b"all of it")


# Clients that leave.


@pytest.mark.parametrize(
    "leaves", [{"sends": 0.5}, {"waits": 0.05}, {"reads": 3}], ids=["sends", "waits", "reads"]
)
def test_a_client_that_leaves_closes_its_socket(leaves):
    async def run() -> tuple[str, bool]:
        server = Scripted(holds_after=2)
        async with server.listening() as address:
            body = {"model": "a", "prompt": "hi", "max_tokens": 50, "stream": True}
            outcome = await pay(address, Visit(Question(0, COMPLETIONS, body), **leaves))
            await asyncio.wait_for(server.gone.wait(), LONG)
            return outcome, bool(server.asked)

    assert asyncio.run(run()) == (CANCELLED, "sends" not in leaves)


def test_a_request_without_an_answer_is_stuck(monkeypatch):
    monkeypatch.setattr(soaking, "PATIENCE", 0.05)
    body = {"model": "a", "prompt": "hi", "max_tokens": 5, "stream": True}

    async def run(server: Scripted) -> str:
        async with server.listening() as address:
            return await pay(address, Visit(Question(0, COMPLETIONS, body)))

    assert asyncio.run(run(Scripted(silent_after=0))) == STUCK
    assert asyncio.run(run(Scripted(holds_after=2))) == STUCK
    monkeypatch.setattr(soaking, "PATIENCE", LONG)
    assert asyncio.run(run(Scripted())) == FINISHED


def test_a_third_of_the_visits_leave_and_all_are_a_function_of_seed_and_number():
    visits = [visit(1, number, ("base", "a")) for number in range(3000)]
    assert visits == [visit(1, number, ("base", "a")) for number in range(3000)]
    assert visits[0] != visit(2, 0, ("base", "a"))
    kinds = Counter(
        "sends" if v.sends < 1 else "waits" if v.waits is not None else "reads" if v.reads else ""
        for v in visits
    )
    assert 0.6 < kinds[""] / 3000 < 0.73
    assert all(kinds[kind] > 250 for kind in ("sends", "waits", "reads"))
    assert {v.question.body["model"] for v in visits} == {"base", "a"}
    assert {v.question.body["stream"] for v in visits} == {True, False}
    assert {v.question.path for v in visits} == {CHAT, COMPLETIONS}


def test_a_soak_counts_what_became_of_every_request(monkeypatch):
    monkeypatch.setattr(soaking, "MORE_MEMORY", 2.0)
    seen = []
    found = soak("", "tiny", 4, 200, 0, lambda *now: seen.append(now), program(refuses=10))
    assert sum(found.counts.values()) == 200 and not found.faults
    assert set(found.counts) == {"finished", "cancelled", "refused"}
    assert all(value >= 10 for value in found.counts.values())
    assert len(found.memory) == 20 and all(held > 1e6 for _, held in found.memory)
    assert len(found.halves) == 2 and found.healthy and seen[-1] == ("requests", 200, 200)
    json.dumps(found.to_dict())


def test_a_soak_tells_of_failures_and_of_what_is_left_running(monkeypatch):
    monkeypatch.setattr(soaking, "MORE_MEMORY", 2.0)
    monkeypatch.setattr(soaking, "still_counted", lambda address: _counted(address, 0.0))
    found = soak("", "tiny", 4, 60, 0, lambda *_: None, program(fails=7, left_over=2))
    assert found.counts["failed"] >= 5
    assert len(found.failures) == 3 and "status 500" in found.failures[0]
    assert any("requests failed" in fault for fault in found.faults)
    assert "the server still counted 2 requests, without any client" in found.faults


_counted = soaking.still_counted


def soaked(**changed) -> Soak:
    counts = {FINISHED: 60, CANCELLED: 30, "refused": 10}
    held = [(n, 10**8 + n) for n in range(10, 101, 10)]
    whole = Soak(0, 100, 3.0, counts, [], held, [10**8, 10**8], 0, True)
    return replace(whole, **changed)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"healthy": False}, "not healthy"),
        ({"counts": {STUCK: 1}}, "1 requests stuck"),
        ({"halves": [100, 106]}, "memory was 6.0 % larger"),
        ({"left": 1}, "still counted 1"),
    ],
)
def test_a_soak_fails_for_what_a_server_must_not_do(changed, fault, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert not soaked().faults and not soaked(halves=[100, 105]).faults
    (found,) = soaked(**changed).faults
    assert fault in found
    show_soak(Screen(), soaked(**changed))
    shown = capsys.readouterr().out
    assert found in shown.replace("\n", " ") and max(map(len, shown.splitlines())) <= 80


# What is served.


def test_greedy_answers_never_end_and_every_token_is_text(tmp_path):
    given, about = prepare("", "tiny", 0, 4, tmp_path)
    assert about.name == "tiny" and about.dtype == "float32"
    base = load_base(given.model)
    assert set(base.tokenizer.eos_token_ids) == {END}
    prompt = base.tokenizer.encode(prompt_of(1))
    assert len(prompt) == len(prompt_of(1))
    pieces = [base.tokenizer.decode([token]) for token in range(3, 512)]
    assert all(piece.isascii() and piece for piece in pieces) and len(set(pieces)) == 509


@pytest.mark.parametrize("bits", [0, 4])
def test_four_adapters_that_differ_are_written_for_the_model(tmp_path, bits):
    given, about = prepare("", "tiny", bits, 4, tmp_path)
    from mlxlora.lora.adapter import Adapter

    adapters = [Adapter.load(path) for path in given.adapters.values()]
    assert tuple(given.adapters) == ADAPTERS and about.bits == bits
    assert {a.rank for a in adapters} == {4} and {len(a.modules) for a in adapters} == {14}
    first = [a.weights[min(a.weights)] for a in adapters]
    assert len({array[0, 0].item() for array in first}) == 4


def test_a_directory_is_served_as_it_is(dense_path, tmp_path):
    given, about = prepare(str(dense_path), "", 0, 4, tmp_path)
    assert given.model == dense_path and about.name == "dense"
    assert len(given.adapters) == 4


# Servers as programs.


def test_a_server_is_ended_when_its_block_is_left():
    with running(OURS, program(), Given(Path(), {})) as server:
        assert asyncio.run(get(server.address, "/health"))[0] == 200
        assert server.resident() > 1e6
    assert server.process.poll() is not None


def test_a_server_that_ends_is_told_with_its_last_words():
    words = [sys.executable, "-c", "raise SystemExit('no such port')"]
    broken = Program(lambda *_: words, PROGRAMS[OURS].fields)
    with (
        pytest.raises(
            BenchError, match=r"server of mlxlora has ended \(exit code 1\)(.|\n)*no such"
        ),
        running(OURS, broken, Given(Path(), {})),
    ):
        pass


def test_adapters_are_named_as_each_server_wants_them():
    given = Given(Path("m"), {"a": Path("x/a"), "b": Path("x/b")})
    assert PROGRAMS[OURS].fields(given, "a") == {"model": "a"}
    assert PROGRAMS[MLX_LM].fields(given, "b") == {"model": "m", "adapters": "x/b"}
    adapters = "--adapter a=x/a --adapter b=x/b"
    wanted = f"mlxlora.cli serve --model m {adapters} --host 127.0.0.1 --port 80"
    assert " ".join(PROGRAMS[OURS].command(given, 80)[3:]) == wanted
    assert "--adapter" not in PROGRAMS[MLX_LM].command(given, 80)


# Both in alternation.

QUICK = ServeOptions(shape="tiny", rounds=2, clients=(1, 3), requests=1, tokens=2, stream_tokens=5)


def test_both_servers_are_measured_in_turns_and_reported():
    turns = []
    programs = {OURS: program(), MLX_LM: program()}
    report = bench_serving(QUICK, lambda what, *_: turns.append(what), programs)
    order = [MLX_LM, OURS, MLX_LM, OURS, OURS, MLX_LM, OURS, MLX_LM]
    assert [turn.split(", ")[1] for turn in turns] == order
    assert report.same_answers == (4, 4)
    rows = [(row.setting.key, row.setting.clients, row.side) for row in report.rows()]
    keys = [(STREAM, 1), (ONE, 1), (MIXED, 1), (ONE, 3), (MIXED, 3)]
    assert rows == [(*key, side) for key in keys for side in (MLX_LM, OURS)]
    assert all(row.cut_short == 0 and row.tokens_per_second > 0 for row in report.rows())
    found = json.loads(json.dumps(report.to_dict()))
    assert [ratio["of"] for ratio in found["ratios"]] == [
        *["mlxlora: adapters mixed / one adapter"] * 2,
        *["mlxlora / mlx-lm: adapters mixed"] * 2,
        *["mlxlora / mlx-lm: one adapter"] * 2,
        "mlxlora / mlx-lm: one stream",
    ]
    assert found["serving"][0]["adapters"] == 1 and found["serving"][-1]["adapters"] == 4


def test_one_server_alone_is_measured_without_a_ratio_to_another():
    options = replace(QUICK, against="none", rounds=1, clients=(2,))
    report = bench_serving(options, lambda *_: None, {OURS: program()})
    assert report.same_answers is None
    assert [c.of for c in report.ratios()] == ["mlxlora: adapters mixed / one adapter"]


def test_no_speed_is_reported_when_the_answers_differ():
    programs = {OURS: program(), MLX_LM: program(salt="other")}
    with pytest.raises(BenchError, match="do not answer alike, so their speeds are not reported"):
        bench_serving(QUICK, lambda *_: None, programs)


def test_answers_of_all_adapters_are_compared():
    texts = {name: [answer(n, text=f"{n}") for n in range(4)] for name in (OURS, MLX_LM)}
    assert agree(texts, "float32") == (4, 4)
    texts[OURS][2] = answer(2, text="else")
    assert agree(texts, "bfloat16") == (3, 4)
    with pytest.raises(BenchError, match="answered 'else' and '2'"):
        agree(texts, "float32")
    texts[OURS][2] = answer(2, text="1")
    with pytest.raises(BenchError, match="mlxlora answered alike with different adapters: '0'"):
        agree({OURS: texts[OURS]}, "bfloat16")


def test_both_servers_must_have_read_and_written_the_same():
    def seen(*answers: Answer) -> dict:
        return {(ONE, 2): Measured(setting(requests=2), answers, 1.0)}

    agree_on_tokens({MLX_LM: seen(answer(1)), OURS: seen(answer(1), answer(2, tokens=3))})
    with pytest.raises(BenchError, match="read 5 and 5 tokens and wrote 10 and 9, for 1 quest"):
        agree_on_tokens({MLX_LM: seen(answer(1)), OURS: seen(answer(1, tokens=9))})
    with pytest.raises(BenchError, match="read 5 and 6 tokens"):
        agree_on_tokens({MLX_LM: seen(answer(1)), OURS: seen(answer(1, prompt_tokens=6))})


def test_a_server_that_answers_nothing_in_time_is_told(monkeypatch):
    monkeypatch.setattr("mlxlora.bench.serving.PROBE_SECONDS", 0.2)
    with pytest.raises(BenchError, match=r"answered none of 4 requests(.|\n)*to warm up"):
        bench_serving(
            replace(QUICK, against="none"), lambda *_: None, {OURS: program(silent_after=0)}
        )


def test_questions_have_numbers_of_their_own_and_begin_with_the_first_adapter():
    groups = settings_of(ServeOptions())
    keys = [[(one.key, one.clients, one.requests) for one in group] for group in groups]
    assert keys == [
        [(STREAM, 1, 3), (ONE, 1, 8), (MIXED, 1, 8)],
        [(ONE, 8, 32), (MIXED, 8, 32)],
        [(ONE, 32, 128), (MIXED, 32, 128)],
    ]
    flat = [one for group in groups for one in group]
    numbers = [n for one in flat for n in range(one.start, one.start + one.requests)]
    assert len(set(numbers)) == len(numbers)
    assert all(one.adapter(one.start) == "a" for one in flat)


def measured(key: str, clients: int, seconds: float, rate: float = 1.0) -> Measured:
    """Eight answers of ten tokens in so many seconds."""
    answers = tuple(answer(n, wait=0.1 * (n + 1)) for n in range(8))
    answers = tuple(replace(a, last=a.first + 9 / rate) for a in answers)
    return Measured(setting(key, clients), answers, seconds)


def round_of(one: float, mixed: float, stream: float) -> dict:
    found = [measured(STREAM, 1, 1.0, stream), measured(ONE, 8, one), measured(MIXED, 8, mixed)]
    return {(m.setting.key, m.setting.clients): m for m in found}


def report(rounds: int = 3) -> Serving:
    ours = [round_of(1.0, 1.25, 30), round_of(4.0, 4.0, 10), round_of(1.0, 2.0, 30)]
    theirs = [round_of(1.0, 10.0, 20), round_of(4.0, 40.0, 20), round_of(1.0, 10.0, 20)]
    sides = {MLX_LM: theirs[:rounds], OURS: ours[:rounds]}
    return Serving(MODEL, 8, MLX_LM, 60.0, (4, 4), sides)


def test_a_ratio_is_taken_within_its_round():
    mixed, against, one, stream = report().ratios()
    assert (mixed.ratio.median, mixed.ratio.least, mixed.ratio.most) == (0.8, 0.5, 1.0)
    assert (against.ratio.median, against.ratio.least, against.ratio.most) == (8.0, 5.0, 10.0)
    assert one.ratio.median == 1.0 and stream.ratio.median == pytest.approx(1.5)
    row = next(row for row in report().rows() if row.setting.key == ONE and row.side == OURS)
    assert (row.requests_per_second, row.tokens_per_second) == (8.0, 80.0)
    assert row.total_tokens_per_second == 120.0
    assert (row.first_token, row.first_token_95) == pytest.approx((0.4, 0.8))


def test_a_quantile_is_a_value_that_was_seen():
    values = [float(n) for n in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.95), quantile([3.0], 0.95)) == (50, 95, 3)


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_tables_fit_a_narrow_terminal(monkeypatch, capsys, rounds):
    monkeypatch.setenv("COLUMNS", "80")
    cut = report(rounds)
    short = replace(cut.rounds[MLX_LM][0][MIXED, 8], answers=(answer(), answer(1)))
    first = {**cut.rounds[MLX_LM][0], (MIXED, 8): short}
    sides = {**cut.rounds, MLX_LM: [first, *cut.rounds[MLX_LM][1:]]}
    show_serving(Screen(), replace(cut, rounds=sides))
    shown = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    told = " ".join(shown.split())
    assert f"after 60 s, in 1 of {rounds} rounds: its figures are those so far." in told
    assert "mlxlora: adapters mixed / one adapter 8 0.80" in told
    assert "mlxlora / mlx-lm: one stream 1 1.50" in told
    assert "4 of 4 adapters gave the same answer" in told


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--serve", "--clients", "1,x"], "--clients '1,x': write whole numbers"),
        (["--serve", "--clients", "0"], "whole numbers from 1"),
        (["--serve", "--shape", "huge"], "--shape must be one of tiny"),
        (["--serve", "--against", "x"], "--against must be mlx-lm or none"),
        (["--serve", "--model", "m", "--bits", "4"], "--bits is for --shape"),
        (["--soak", "5"], "give --serve too"),
        (["--serve", "--soak", "5", "--shape", "huge"], "--shape must be one of tiny"),
    ],
)
def test_a_wrong_option_is_answered_before_anything_starts(words, text):
    with pytest.raises(ConfigError, match=text):
        CliRunner().invoke(app, ["bench", *words], catch_exceptions=False)
    check(ServeOptions())


@pytest.mark.slow
def test_mlx_lm_s_server_answers_as_its_own_generate_does_with_each_adapter(tmp_path):
    given, _ = prepare("", "tiny", 0, 4, tmp_path)
    one = setting(clients=2, requests=8, max_tokens=6)
    with running(MLX_LM, PROGRAMS[MLX_LM], given) as server:
        mlx_lm = partial(PROGRAMS[MLX_LM].fields, given)
        seen = asyncio.run(load(server.address, one, mlx_lm, LONG))
    assert seen.complete and {a.tokens for a in seen.answers} == {6}
    texts = {a.number: a.text for a in seen.answers}
    for number in range(len(ADAPTERS)):
        path = given.adapters[one.adapter(number)]
        model, tokenizer = mlx_lm_load(str(given.model), adapter_path=str(path))
        wanted = mlx_lm_generate(model, tokenizer, prompt_of(number), max_tokens=6)
        assert texts[number] == wanted
    assert len(set(texts.values())) == 8


@pytest.mark.slow
def test_both_real_servers_are_measured_and_answer_alike():
    words = "bench --serve --shape tiny --rounds 1 --clients 2 --requests 1 --json"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["same_answers"] == [4, 4] and len(found["ratios"]) == 4
    assert [(row["setting"], row["side"]) for row in found["serving"]] == [
        (key, side) for key in (STREAM, ONE, MIXED) for side in (MLX_LM, OURS)
    ]
    assert all(row["tokens_per_second"] > 0 for row in found["serving"])


@pytest.mark.slow
def test_the_real_server_stays_whole_under_clients_that_vanish(monkeypatch):
    monkeypatch.setattr(soaking, "MORE_MEMORY", 2.0)  # it still fills its caches
    found = soak("", "tiny", 4, 100, 0, lambda *_: None)
    assert not found.faults and found.counts.keys() <= {FINISHED, CANCELLED}
    assert sum(found.counts.values()) == 100 and found.counts[CANCELLED] > 10
