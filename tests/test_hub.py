"""A model by its Hub id, from a local server that speaks the Hub's API."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

NAME, COMMIT = "someone/tiny", "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """GET /api/models/NAME/{revision,tree}/..., HEAD and GET /NAME/resolve/COMMIT/FILE."""

    directory: Path
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(self.path)
        sizes = {file.name: file.stat().st_size for file in self.directory.iterdir()}
        if self.path.startswith(f"/api/models/{NAME}/revision/"):
            files = [{"rfilename": name} for name in sizes]
            self._answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": files}).encode())
        elif self.path.startswith(f"/api/models/{NAME}/tree/"):
            files = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]
            self._answer(json.dumps(files).encode())
        elif self.path.startswith(f"/{NAME}/resolve/"):
            self._answer((self.directory / self.path.rpartition("/")[2]).read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, body: bytes):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(quantized_path):
    handler = type("Served", (Hub,), {"directory": quantized_path, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
    server.shutdown()
    thread.join()
    server.server_close()


def mlxlora(endpoint, cache, *arguments):
    hidden = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-m", "mlxlora.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_a_model_is_fetched_by_its_id_and_remembered_with_its_commit(hub, rows, tmp_path):
    endpoint, asked = hub
    train = ["train", "--model", NAME, "--data", rows, "--out", tmp_path / "run", "--updates", 1]
    done = mlxlora(endpoint, tmp_path / "cache", *train)
    assert done.returncode == 0, done.stderr
    assert any(path.endswith("model.safetensors") for path in asked)
    provenance = json.loads((tmp_path / "run" / "adapter" / "provenance.json").read_text())
    assert provenance["base"]["name"] == NAME
    assert provenance["base"]["revision"] == COMMIT
    # Without the server the fetched copy serves.
    chat = ["chat", "--model", NAME, "--adapter", tmp_path / "run" / "adapter"]
    done = mlxlora(
        "http://127.0.0.1:9",
        tmp_path / "cache",
        *chat,
        "--prompt",
        "hi",
        "--max-tokens",
        2,
        "--json",
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_id_is_one_message(hub, tmp_path):
    done = mlxlora(hub[0], tmp_path / "cache", "chat", "--model", "no/body", "--prompt", "hi")
    assert done.returncode == 2
    assert "no/body is neither a directory here nor to be had from the Hub" in done.stderr
    assert "Traceback" not in done.stderr
