"""A model by its Hub id, from a local server that speaks the Hub's API."""

import json
import subprocess
import sys

import pytest
from hub_server import TOKEN, environment, serving

NAME = "someone/tiny"


@pytest.fixture
def hub(quantized_path):
    with serving() as hub:
        hub.put(NAME, {file.name: file.read_bytes() for file in quantized_path.iterdir()})
        yield hub


def mlxlora(endpoint, cache, *arguments, token=""):
    return subprocess.run(
        [sys.executable, "-m", "mlxlora.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(endpoint, cache, token),
        timeout=120,
    )


def test_a_model_is_fetched_by_its_id_and_remembered_with_its_commit(hub, rows, tmp_path):
    """From a private repo, and the token is written nowhere."""
    hub.repos[NAME].private = True
    cache, run = tmp_path / "cache", tmp_path / "run"
    train = ["train", "--model", NAME, "--data", rows, "--out", run, "--updates", 1]
    trained = mlxlora(hub.endpoint, cache, *train, token=TOKEN)
    assert trained.returncode == 0, trained.stderr
    assert ("GET", f"/{NAME}/resolve/{hub.repos[NAME].commit('main')}/model.safetensors") in (
        hub.asked
    )
    provenance = json.loads((run / "adapter" / "provenance.json").read_text())
    assert provenance["base"]["name"] == NAME
    assert provenance["base"]["revision"] == hub.repos[NAME].commit("main")
    assert hub.tokens == {TOKEN}
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {run / "log.jsonl", run / "run.toml"} <= set(written)
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
    assert TOKEN not in trained.stdout + trained.stderr
    # Without the server the fetched copy serves.
    chat = ["chat", "--model", NAME, "--adapter", run / "adapter", "--prompt", "hi", "--json"]
    done = mlxlora("http://127.0.0.1:9", cache, *chat, "--max-tokens", 2)
    assert done.returncode == 0, done.stderr


def test_an_unknown_id_is_one_message(hub, tmp_path):
    chat = ["chat", "--model", "no/body", "--prompt", "hi"]
    done = mlxlora(hub.endpoint, tmp_path / "cache", *chat)
    assert done.returncode == 2
    assert "no/body is neither a directory here nor to be had from the Hub" in done.stderr
    assert "you are not logged in" in done.stderr
    assert "Traceback" not in done.stderr
