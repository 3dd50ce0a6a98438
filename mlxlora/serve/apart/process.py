"""A process for work that may have to be ended, as seen from the server's."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mlxlora.errors import DataError


class Lost(Exception):
    """The process ended over what it was asked: too much time or memory, or a fault of its own."""


class Process:
    """Started when it is first needed, and again after it was lost. For any thread."""

    def __init__(self, program: str, needed: Callable[[], object]) -> None:
        """program: the module that it runs. needed: makes what that is told first of all."""
        self.losses = 0  # what it knew before the last one, it knows no more
        self._needed, self._program = needed, program
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._greeted = False

    def start(self) -> None:
        """Have it get ready, if it is not there any more; wait until it reads, not longer.

        Raises what makes what it needs, or OSError if it cannot be started.
        """
        with self._lock:
            self._start()

    def ask(self, seconds: float, name: str, *given: Any) -> tuple[Any, ...]:
        """Have this done within so many seconds of processor time.

        Raises DataError for what it cannot use of what it needs, OSError if it cannot be started,
        or Lost.
        """
        with self._lock:
            connection = self._start()
            self._greet(connection)
            try:
                connection.send((seconds, name, given))
                return tuple(connection.recv())
            except (EOFError, OSError) as error:
                self._end()
                raise Lost from error

    def close(self) -> None:
        with self._lock:
            self._end()

    def _greet(self, connection: Connection) -> None:
        if self._greeted:
            return
        try:
            (fault,) = connection.recv()
        except (EOFError, OSError) as error:
            self._end()
            raise OSError("a process that the server needs ended as it began") from error
        if fault:
            self._end()
            raise DataError(fault)
        self._greeted = True

    def _start(self) -> Connection:
        if self._running is not None and self._running.poll() is not None:
            self._end()  # by another's hand, of a system short of memory perhaps: nobody's fault
        if self._connection is not None:
            return self._connection
        needed = self._needed()
        ours, theirs = socket.socketpair()
        # What can be imported here can be there; nothing else is looked for where it is started.
        paths = os.pathsep.join(path for path in sys.path if path)
        try:
            with theirs:
                self._running = subprocess.Popen(
                    [sys.executable, "-P", "-m", self._program, str(theirs.fileno())],
                    env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # its last words
                    start_new_session=True,  # Ctrl-C is for the server
                )
            self._connection = Connection(ours.detach())
        finally:
            ours.close()
        self._greeted = False
        try:
            self._connection.send(needed)
        except OSError:
            self._end()
            raise
        return self._connection

    def _end(self) -> None:
        if self._connection is not None:
            self.losses += 1
            self._connection.close()
            self._connection = None
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            self._running = None

    def __del__(self) -> None:
        self._end()
