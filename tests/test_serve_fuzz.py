"""Thousands of requests made from the wire format: each is answered or refused, none is a fault.

MLXLORA_REQUESTS says how many the slow test sends; it prints how many were answered how.
"""

import asyncio
import json
import os
import shutil
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import exchange, live, request
from openai.types import Completion
from openai.types.chat import ChatCompletion
from wire_fuzz import asked

from mlxlora.serve.engine import Options

AT_ONCE = 4
FEW = 300
MANY = int(os.environ.get("MLXLORA_REQUESTS", "5000"))
ANSWERS = {"/v1/chat/completions": ChatCompletion, "/v1/completions": Completion}
REFUSALS = {400, 404, 408, 413, 429}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    where = tmp_path_factory.mktemp("fuzz") / "served"
    options = Options(rows=8, waiting=64, context=400)
    with live(where, options=options, max_tokens=8) as found:
        broken = found.root / "broken"
        shutil.copytree(found.root / "team" / "third", broken)
        (broken / "adapters.safetensors").write_bytes(b"\xff" * 100)
        (found.root / "out").symlink_to(where / "model")
        (found.root / "round").symlink_to(found.root / "round")
        shutil.copytree(found.root / "team" / "third", found.root / "huge")
        config = json.loads((found.root / "huge" / "adapter_config.json").read_text())
        config["lora_parameters"] = {"rank": 10**12, "scale": 1e308, "dropout": -1}
        (found.root / "huge" / "adapter_config.json").write_text(json.dumps(config))
        yield found


def check(one, answer):
    """An answer of the right form; a refusal of OpenAI's."""
    if not one.stays and not answer.complete:
        return
    if answer.status != 200:
        assert answer.status in REFUSALS, (one, answer)
        assert answer.error["type"] in ("invalid_request_error", "rate_limit_error")
        assert len(answer.error["message"]) < 2000
    elif answer.header("content-type").startswith("text/event-stream"):
        for event in answer.events:
            fault = event.get("error", {"type": "invalid_request_error"})
            assert fault["type"] == "invalid_request_error", (one, event)
    elif one.path in ANSWERS:
        ANSWERS[one.path].model_validate(answer.json, strict=False)
    else:
        assert answer.json["status"] == "ok"


def send(server, batch, counts):
    async def go():
        whole = [request("POST", one.path, one.body) for one in batch]
        sent = [
            data if one.cut is None else data[: one.cut]
            for one, data in zip(batch, whole, strict=True)
        ]
        leave = [0 if one.cut is not None else one.leave for one in batch]
        exchanges = [
            exchange(server.port, data, leave=after)
            for data, after in zip(sent, leave, strict=True)
        ]
        return await asyncio.gather(*exchanges)

    for one, answer in zip(batch, asyncio.run(go()), strict=True):
        counts[answer.status if one.stays else "client left"] += 1
        check(one, answer)
    server.check_well()
    assert "a fault of this server" not in "".join(server.said[-AT_ONCE:])


def fuzz(server, requests, **options):
    counts = Counter()

    @settings(max_examples=max(1, requests // AT_ONCE), deadline=None, **options)
    @given(st.lists(asked(), min_size=AT_ONCE, max_size=AT_ONCE))
    def run(batch):
        send(server, batch, counts)

    run()
    failed = server.engine.vitals.counters
    assert failed.restarts == 0 and failed.failed == 0
    return counts


def test_a_few_hundred_requests_are_answered_or_refused(server):
    counts = fuzz(server, FEW, derandomize=True)
    assert counts[200] > FEW // 10 and counts[400] > FEW // 10


@pytest.mark.slow
def test_thousands_of_requests_are_answered_or_refused(server, capsys):
    counts = fuzz(server, MANY)
    with capsys.disabled():
        shown = ", ".join(f"{status}: {count:,}" for status, count in counts.most_common())
        print(f"\n{counts.total():,} requests: {shown}")
