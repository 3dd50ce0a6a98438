"""The application on a socket: how it ends."""

import os
import signal
import threading

import httpx
import pytest

from mlxlora.serve import server
from mlxlora.serve.app import application
from mlxlora.serve.engine import Engine
from mlxlora.serve.guard import Rules
from mlxlora.serve.service import Service
from mlxlora.verbs.signals import ending_cleanly

ASKED = {"model": "base", "prompt": "a", "max_tokens": 400, "n": 16, "stream": True}


def test_a_kill_ends_the_answers_in_the_making_and_says_so(dense, monkeypatch):
    monkeypatch.setattr(server, "SHUTDOWN_SECONDS", 0)
    lines: list[str] = []

    def client():
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        with httpx.stream("POST", url, json=ASKED, timeout=60) as response:
            for line in response.iter_lines():
                if not lines:
                    os.kill(os.getpid(), signal.SIGTERM)
                lines.append(line)

    asking = threading.Thread(target=client)
    with ending_cleanly(), Engine(dense) as engine:
        listener = server.listen("127.0.0.1", 0)
        app = application(Service(engine, "base"), Rules())
        with pytest.raises(KeyboardInterrupt):
            server.run(app, listener, asking.start, engine.stop)
        asking.join()
    told = [line for line in lines if line]
    assert "shutting down" in told[-2]
    assert told[-1] == "data: [DONE]"
