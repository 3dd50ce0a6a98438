"""Tab in a shell: what it offers, and that asking costs no heavy import."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mlxlora.cli import app
from mlxlora.verbs.completion import ASKED

PROGRAM = [sys.executable, "-m", "mlxlora.cli"]


def asked(shell: str, line: str) -> str:
    """What the program answers a shell in which this line stands before the cursor."""
    words = shlex.split(line) + [""] * line.endswith(" ")
    told = {ASKED: f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    told |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    told |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        PROGRAM, capture_output=True, text=True, timeout=60, env=os.environ | told, check=True
    )
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_offered_verbs_and_options(shell):
    assert "train" in asked(shell, "mlxlora tr")
    assert "fuse" not in asked(shell, "mlxlora tr")
    assert "--method" in asked(shell, "mlxlora train --met")
    assert "merge" in asked(shell, "mlxlora adapter ")


def test_a_shell_is_offered_the_values_of_a_choice():
    assert {"lora", "dora", "full"} <= set(asked("bash", "mlxlora train --method ").split())
    assert "gguf-lora" in asked("bash", "mlxlora export --format gg")
    assert "train.learning_rate=" in asked("bash", "mlxlora train --set train.l")


def test_bash_itself_completes(tmp_path):
    program = tmp_path / "mlxlora"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(mlxlora completion bash)"\n'
        "COMP_WORDS=(mlxlora quan) COMP_CWORD=1\n"
        '_mlxlora_completion mlxlora\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | path,
    )
    assert done.stdout.split() == ["quantize"]


def test_the_script_is_one_json_object_where_that_is_asked():
    done = CliRunner().invoke(app, ["completion", "fish", "--json"])
    assert "complete --command mlxlora" in json.loads(done.stdout)["script"]


def test_a_shell_that_is_not_known_is_refused():
    assert CliRunner().invoke(app, ["completion", "cmd"]).exit_code == 2


def test_answering_a_shell_imports_nothing_heavy():
    code = (
        "import sys\nfrom mlxlora.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'mlx.core', 'mlx_lm', 'transformers', 'numpy', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    told = {ASKED: "complete_bash", "COMP_WORDS": "mlxlora tr", "COMP_CWORD": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | told, timeout=60)
