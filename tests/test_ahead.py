import threading

import pytest

from mlxlora.data.ahead import ahead


def test_items_come_in_order_and_all():
    assert list(ahead(range(50), 3)) == list(range(50))
    assert list(ahead([], 3)) == []


def test_items_are_made_in_another_thread_and_only_so_many_in_advance():
    made, threads = [], set()
    enough = threading.Event()

    def items():
        for number in range(10):
            made.append(number)
            threads.add(threading.current_thread().name)
            if number == 3:  # one is used, two wait, this one is at hand
                enough.set()
            yield number

    stream = ahead(items(), 2)
    assert next(stream) == 0
    assert enough.wait(5)
    assert len(made) <= 4 and threads == {"ahead"}
    stream.close()
    assert len(made) <= 5


def test_what_making_raises_is_raised_in_its_turn():
    def items():
        yield 1
        raise ValueError("row 2")

    stream = ahead(items(), 4)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="row 2"):
        next(stream)


def test_closing_ends_the_thread_even_if_nobody_takes_what_it_made():
    stream = ahead(iter(int, 1), 1)
    next(stream)
    stream.close()
    assert not any(thread.name == "ahead" for thread in threading.enumerate())
