"""The two servers as programs of their own: started on a free port, waited for, ended.

Both get the same model and the same adapters, and multiply with the same BLAS: on Linux that is
the OpenBLAS that importing mlxlora loads, many times as fast as the one in MLX's wheel. mlxlora
is told its adapters when it starts and knows them by name; mlx_lm.server is told an adapter's
directory in each request, and takes it only beside a model that is named too.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from mlxlora.bench.compare import TAIL_LINES, BenchError
from mlxlora.bench.job import MLX_LM, OURS
from mlxlora.bench.served import Given
from mlxlora.bench.wire import Address, BrokenAnswer, get

HOST = "127.0.0.1"
START_SECONDS = 600.0  # a large model may have to be read from a slow disk
WITH_SAME_BLAS = "import mlxlora; from mlx_lm.cli import main; main()"
STOP_SECONDS = 10.0  # after which a server is ended for good
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Program:
    """How a server is started, and how a request tells it which adapter is meant."""

    command: Callable[[Given, int], list[str]]  # (what is served, port) -> words
    fields: Callable[[Given, str], dict[str, str]]  # (what is served, adapter) -> of the request


def _ours(given: Given, port: int) -> list[str]:
    words = [sys.executable, "-P", "-m", "mlxlora.cli", "serve", "--model", str(given.model)]
    for name, path in given.adapters.items():
        words += ["--adapter", f"{name}={path}"]
    return [*words, "--host", HOST, "--port", str(port)]


def _mlx_lm(given: Given, port: int) -> list[str]:
    words = [sys.executable, "-P", "-c", WITH_SAME_BLAS, "server", "--model", str(given.model)]
    return [*words, "--host", HOST, "--port", str(port), "--log-level", "WARNING"]


def small_cache(given: Given, port: int) -> list[str]:
    """Ours, keeping few prompts, so that what it keeps is full soon and grows no more."""
    return [*_ours(given, port), "--prompt-cache", "16MB"]


PROGRAMS: dict[str, Program] = {
    OURS: Program(_ours, lambda _, adapter: {"model": adapter}),
    MLX_LM: Program(
        _mlx_lm,
        lambda given, adapter: {
            "model": str(given.model),
            "adapters": str(given.adapters[adapter]),
        },
    ),
}


@dataclass(frozen=True)
class Server:
    """One that runs."""

    name: str
    address: Address
    process: subprocess.Popen[bytes]
    said: IO[bytes]  # its output

    def check(self) -> None:
        """Raise BenchError if it has ended."""
        code = self.process.poll()
        if code is not None:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            raise BenchError(f"the server of {self.name} has ended ({how}):\n{self.last_words()}")

    def last_words(self) -> str:
        self.said.seek(0)
        lines = self.said.read().decode("utf-8", "replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])

    def resident(self) -> int:
        """Bytes of memory that its process holds; 0 where the system does not tell."""
        words = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
                fields = dict(line.split(":", 1) for line in file if ":" in line)
            return int(fields["VmRSS"].split()[0]) * 1024
        with contextlib.suppress(OSError, ValueError):  # macOS has no /proc; not run there
            return int(subprocess.run(words, capture_output=True, check=False).stdout) * 1024
        return 0


@contextlib.contextmanager
def running(name: str, program: Program, given: Given) -> Iterator[Server]:
    """A server that answers; ended when the block is left. Raises BenchError if it does not."""
    port = _free_port()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            program.command(given, port),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        server = Server(name, Address(HOST, port), process, said)
        try:
            _wait_for(server)
            yield server
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as held:
        held.bind((HOST, 0))
        return int(held.getsockname()[1])


def _wait_for(server: Server) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        server.check()
        with contextlib.suppress(OSError, BrokenAnswer):
            status, _ = asyncio.run(get(server.address, "/health"))
            if status == 200:
                return
        time.sleep(POLL_SECONDS)
    raise BenchError(
        f"the server of {server.name} was not ready after {START_SECONDS:.0f} s:\n"
        f"{server.last_words()}"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
