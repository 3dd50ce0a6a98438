"""Go's own text/template, where Go is installed."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("ollama.go")


@pytest.fixture(scope="session")
def go(tmp_path_factory):
    """(template, chats) -> {"texts", "tags"}, by ollama.go. Chats: messages, system, think."""
    if shutil.which("go") is None:
        pytest.skip("Go is not installed (apt install golang-go)")
    place = tmp_path_factory.mktemp("go")
    environment = {**os.environ, "GOCACHE": str(place / "cache"), "GO111MODULE": "off"}
    binary = place / "ollama"
    subprocess.run(["go", "build", "-o", binary, PROGRAM], check=True, env=environment)

    def run(template: str, chats: list[dict]) -> dict:
        asked = json.dumps({"template": template, "chats": chats})
        done = subprocess.run([binary], input=asked, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
