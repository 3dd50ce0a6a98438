"""The next items of an iterator, made in a thread while the present one is used.

Reading, rendering and tokenizing rows then cost an update nothing: tokenizers work outside
Python's lock, and so does MLX while an update is computed.
"""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterable[Item], count: int) -> Generator[Item]:
    """Yield what items yields, at most count of them made in advance, in the same order.

    What making one raises is raised when its turn comes. When the generator is closed the
    thread makes the item it is at, and no more.
    """
    made: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(count)
    closed = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not closed.is_set():
            try:
                made.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item, None)
                if closed.is_set():
                    return
            put(None, _End())
        except BaseException as error:  # it belongs to whoever waits for the item
            put(None, error)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, _End):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()


class _End(Exception):
    """There are no more items."""
