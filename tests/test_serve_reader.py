"""What reads requests goes on, whatever one of them does to it."""

import asyncio
import threading

import pytest

from mlxlora.serve.http.reader import Reader
from mlxlora.serve.wire.refusals import WireError


def test_requests_are_read_one_at_a_time_in_their_order():
    order, at_once, most = [], [0], [0]

    def read(number: int) -> int:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        order.append(number)
        at_once[0] -= 1
        return number

    async def go():
        reader = Reader()
        return await asyncio.gather(*[reader(lambda n=n: read(n)) for n in range(20)])

    assert asyncio.run(go()) == order == list(range(20)) and most == [1]


def test_what_reading_raises_is_raised():
    async def go():
        await Reader()(lambda: {}["model"])

    with pytest.raises(KeyError, match="model"):
        asyncio.run(go())


def test_a_request_that_is_never_read_is_refused_and_the_others_are_read():
    held = threading.Event()

    async def go():
        reader = Reader(longest=0.3)
        stuck = asyncio.ensure_future(reader(held.wait))
        await asyncio.sleep(0)
        others = [asyncio.ensure_future(reader(lambda n=n: n)) for n in range(3)]
        with pytest.raises(WireError, match="took longer than") as refused:
            await stuck
        assert refused.value.status == 400
        return [await asyncio.wait_for(other, 30) for other in [*others, reader(lambda: 3)]]

    try:
        assert asyncio.run(go()) == [0, 1, 2, 3]
    finally:
        held.set()


def test_a_request_whose_client_is_gone_before_its_turn_is_not_read():
    held, read = threading.Event(), []

    async def go():
        reader = Reader()
        first = asyncio.ensure_future(reader(held.wait))
        await asyncio.sleep(0)
        gone = asyncio.ensure_future(reader(lambda: read.append(1)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        held.set()
        await first
        return await reader(lambda: "next")

    assert asyncio.run(go()) == "next" and read == []
