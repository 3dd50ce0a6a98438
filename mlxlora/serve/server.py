"""The application on a socket: uvicorn, with limits on connections and how long they may take."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable

import uvicorn

from mlxlora.errors import ConfigError
from mlxlora.serve.guard import Guard
from mlxlora.serve.protocol import HEADER_BYTES, IDLE_SECONDS, MOST_CONNECTIONS, TimedProtocol

SHUTDOWN_SECONDS = 5  # for answers in the making, once the server is to stop
TELL_SECONDS = 5  # for telling that they were ended
BACKLOG = 512
OTHER_FILES = 256  # that a process has open beside its connections


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any free one. Raises ConfigError if it cannot."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
        return found
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another with --port"
        ) from error


def server(
    app: Guard, ready: Callable[[], None], stop: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """The server, not yet run; ready is called when requests are answered.

    stop, which may wait, is to end the answers that are still in the making SHUTDOWN_SECONDS after
    the server was told to end, so that their clients are told why.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            loop = asyncio.get_running_loop()
            late = loop.call_later(SHUTDOWN_SECONDS, loop.run_in_executor, None, stop)
            await super().shutdown(sockets)
            late.cancel()

    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS + TELL_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return Server(config)


def run(
    app: Guard, listener: socket.socket, ready: Callable[[], None], stop: Callable[[], None]
) -> None:
    """Serve until Ctrl-C or a kill. Raises KeyboardInterrupt then."""
    allow_connections()
    server(app, ready, stop).run([listener])


def allow_connections() -> None:
    """Raise the process's limit of open files, which is 256 on a Mac, as far as it may be."""
    wanted = MOST_CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
