"""The worst of the strangers' inputs through the program itself: one message, exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import randomized, write_rows
from hostile import DEEP
from test_hostile_model import edit, evil
from typer.testing import CliRunner

from mlxlora.base import load
from mlxlora.cli import app
from mlxlora.config import LoraConfig
from mlxlora.errors import MlxLoraError
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.fresh import collect, new_layers


@pytest.fixture
def good(dense_path, tmp_path) -> dict[str, Path]:
    """A model, an adapter of it and rows, all in order, and nothing else in the directory."""
    base = load(dense_path)
    new_layers(base.model, LoraConfig(rank=2), 0)
    randomized(base.model)
    told = {"base": base.identity.to_dict()}
    return {
        "model": shutil.copytree(dense_path, tmp_path / "model"),
        "adapter": collect(base.model, LoraConfig(rank=2), told).save(tmp_path / "adapter"),
        "rows": write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 9),
    }


def code_in_the_model(good):
    evil(good["model"])
    edit(good["model"] / "config.json", model_file="evil.py")


def code_in_the_tokenizer(good):
    evil(good["model"])
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    edit(good["model"] / "tokenizer_config.json", **own)
    (good["model"] / "tokenizer.json").unlink()


def pipe_in_the_model(good):
    (good["model"] / "tokenizer.json").unlink()
    os.mkfifo(good["model"] / "tokenizer.json")


def blocks_without_end(good):
    edit(good["model"] / "config.json", num_hidden_layers=10**9)


def template_without_end(good):
    loop = "{% for i in range(10**9) %}x{% endfor %}"
    (good["model"] / "chat_template.jinja").write_text(loop)


def no_numbers(good):
    adapter = Adapter.load(good["adapter"])
    weights = {name: array * float("nan") for name, array in adapter.weights.items()}
    mx.save_safetensors(str(good["adapter"] / "adapters.safetensors"), weights)
    (good["adapter"] / "provenance.json").unlink()


def deep_provenance(good):
    (good["adapter"] / "provenance.json").write_text('{"a":' * DEEP)


def wrong_provenance(good):
    (good["adapter"] / "provenance.json").write_text('{"base": ["\\u001b[2J"], "metrics": 5}')


def huge_header(good):
    (good["adapter"] / "adapters.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")


def deep_rows(good):
    good["rows"].write_text("[" * DEEP)


def endless_rows(good):
    good["rows"].unlink()
    good["rows"].symlink_to("/dev/zero")


VERBS = {
    "train": "train --model model --data rows.jsonl --out run",
    "eval": "eval --model model --data rows.jsonl --adapter adapter",
    "chat": "chat --model model --prompt hi",
    "fuse": "fuse --model model --adapter adapter --out fused",
    "info": "adapter info adapter",
    "verify": "adapter verify adapter --model model",
}


WORST = [
    ("train", code_in_the_model, "wants to run its own Python"),
    ("chat", template_without_end, "Range too big"),
    ("fuse", no_numbers, "NaN or infinity"),
    ("info", wrong_provenance, "base must be an object"),
    ("eval", endless_rows, "not a regular file"),
]
AS_BAD = [
    ("chat", code_in_the_tokenizer, "does not load"),
    ("eval", pipe_in_the_model, "neither a file nor a directory"),
    ("fuse", blocks_without_end, "they do not belong together"),
    ("info", deep_provenance, "nested too deeply"),
    ("verify", huge_header, "not a whole safetensors file"),
    ("train", deep_rows, "not valid JSON"),
]


def everything(directory: Path) -> set[str]:
    return {str(path) for path in directory.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("verb, damage, says", WORST)
def test_the_worst_is_one_message_of_the_program(good, tmp_path, verb, damage, says):
    damage(good)
    before = everything(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mlxlora.cli", *VERBS[verb].split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
    assert "\x1b[2J" not in done.stdout + done.stderr
    assert everything(tmp_path) == before


@pytest.mark.parametrize("verb, damage, says", AS_BAD)
def test_what_is_as_bad_is_an_error_of_the_verb(good, tmp_path, verb, damage, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(good)
    before = everything(tmp_path)
    result = CliRunner().invoke(app, VERBS[verb].split())
    assert isinstance(result.exception, MlxLoraError), result.exception
    assert says in str(result.exception)
    assert everything(tmp_path) == before


def test_escape_sequences_of_an_adapter_do_not_reach_the_terminal(good):
    told = json.loads((good["adapter"] / "provenance.json").read_text())
    told["base"]["name"] = "\x1b[2J\x07evil"
    (good["adapter"] / "provenance.json").write_text(json.dumps(told))
    shown = CliRunner().invoke(app, ["adapter", "info", str(good["adapter"])]).output
    assert "\x1b" not in shown and r"\x1b[2J\x07evil" in shown
