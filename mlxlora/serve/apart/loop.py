"""What a process for such work does: it is asked, works within a limit, and answers.

A text that a stranger wrote can make native code loop, take all memory or overflow its stack.
Here that ends one process: each piece of work has a limit of processor time, beyond which the
system ends it, and whoever asked sees the other end of the socket closed.
"""

import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from mlxlora.errors import DataError


def work(descriptor: int, begin: Callable[[Any], object]) -> None:
    """begin: from what is told first of all to what does the work, by the names of its methods."""
    with suppress(EOFError, ConnectionError):  # nobody is there any more
        _work(Connection(descriptor), begin)


def _work(connection: Any, begin: Callable[[Any], object]) -> None:
    try:
        worker = begin(connection.recv())
    except DataError as error:
        connection.send((str(error),))
        return
    connection.send(("",))
    while True:
        seconds, name, given = connection.recv()
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends a process
        answer = getattr(worker, name)(*given)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(answer)
