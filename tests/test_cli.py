"""The program as a user runs it: exit codes, --json, messages."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = [sys.executable, "-m", "mlxlora.cli"]


def mlxlora(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


def last_line(done: subprocess.CompletedProcess) -> dict:
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_help_imports_no_mlx():
    code = (
        "import sys, mlxlora.cli\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(mlxlora.cli.app, ['train', '--help'])\n"
        "assert result.exit_code == 0 and '--rank' in result.output\n"
        "heavy = {'mlx.core', 'mlx_lm', 'transformers', 'numpy', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_whole_way_from_rows_to_a_fused_model(dense_path, rows, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    adapter = run / "adapter"
    done = mlxlora("quantize", "--model", dense_path, "--out", base, "--group-size", 32, "--json")
    assert done.returncode == 0 and last_line(done)["bits"] == 4, done.stderr
    train = ["train", "--model", base, "--data", rows, "--out", run, "--rank", 4, "--epochs", 2]
    done = mlxlora(*train, "--learning-rate", "5e-3", "--batch-size", 4, "--json")
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    assert result["reason"] == "finished" and result["update"] == 20
    assert len(done.stdout.strip().splitlines()) == 1
    data = ["--data", rows / "valid.jsonl"]
    done = mlxlora(
        "eval", "--model", base, "--adapter", adapter, "--with-base", *data, "--generate", "--json"
    )
    names = {r["name"]: r for r in last_line(done)["results"]}
    assert set(names) == {"base", str(adapter)}
    assert names[str(adapter)]["loss"] == pytest.approx(result["valid_loss"], rel=1e-3)
    assert {"loss", "perplexity", "tokens", "exact_match"} <= set(names["base"])
    done = mlxlora("chat", "--model", base, "--adapter", adapter, "--prompt", "hi", "--json")
    assert done.returncode == 0 and "text" in last_line(done)
    done = mlxlora(
        "fuse", "--model", base, "--adapter", adapter, "--out", tmp_path / "fused", "--json"
    )
    told = last_line(done)
    assert told["bits"].startswith("bits chosen by layer") and told["fidelity"]["kept"] > 0.9
    done = mlxlora("eval", "--model", tmp_path / "fused", *data, "--json")
    assert last_line(done)["results"][0]["loss"] == pytest.approx(result["valid_loss"], abs=0.05)
    done = mlxlora("adapter", "info", adapter)
    assert "rank" in done.stdout and "alpha 32" in done.stdout
    done = mlxlora("adapter", "verify", adapter, "--model", base, "--json")
    assert last_line(done)["ok"] is True
    done = mlxlora("adapter", "verify", adapter, "--model", dense_path)
    assert done.returncode == 2 and "not the base of this adapter (base, bits)" in done.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["train", "--set", "lora.rnk=3"], "did you mean lora.rank?"),
        (["train", "--rank", "0"], "lora.rank must be at least 1"),
        (["train", "--method", "lorra"], "lora.method must be 'lora' or 'rslora' or 'dora'"),
        (["train"], "not given: model, out, data.path"),
        (["train", "--rnak", "3"], "--rank"),
        (["train", "none.toml"], "cannot read none.toml: No such file"),
        (["eval", "--model", "/nowhere", "--data", "x.jsonl"], "no model directory /nowhere"),
        (["chat", "--model", "/nowhere"], "no model directory /nowhere"),
        (
            ["fuse", "--model", "m", "--adapter", "a", "--out", "o", "--bits", "x"],
            "is not known; known",
        ),
        (["adapter", "info", "/nowhere"], "not an adapter directory"),
        (["tarin"], "train"),
        (["chat", "--model", "m", "--json"], "answers one --prompt"),
        (["chat", "--model", "m", "--max-tokens", "0"], "--max-tokens"),
        (["chat", "--model", "m", "--temperature", "-1"], "--temperature"),
        (["eval", "--model", "m", "--data", "d", "--rows", "-3"], "--rows"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(arguments, says, tmp_path):
    done = mlxlora(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_never_overwritten(dense_path, rows, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    done = mlxlora("train", "--model", dense_path, "--data", rows, "--out", tmp_path / "run")
    assert done.returncode == 2 and "never overwritten" in done.stderr
    assert os.listdir(tmp_path / "run") == ["notes"]


def test_an_output_below_a_file_is_one_message(dense_path, rows, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = mlxlora("train", "--model", dense_path, "--data", rows, "--out", tmp_path / "file/run")
    assert done.returncode == 2 and "cannot write" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_saves_and_exits_with_3(number, dense_path, rows, tmp_path):
    run = tmp_path / "run"
    command = [*PROGRAM, "train", "--model", dense_path, "--data", rows, "--out", run]
    process = subprocess.Popen(
        [*map(str, command), "--updates", "100000", "--set", "eval.every=100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = run / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"step"' in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "Interrupted after update" in out
    assert f"mlxlora chat --model {dense_path} --adapter {run / 'adapter'}" in " ".join(out.split())
    assert mlxlora("adapter", "info", run / "adapter").returncode == 0
    assert json.loads(log.read_text().splitlines()[-1])["reason"] == "interrupted"


def test_a_full_disk_is_one_message(dense_path, tmp_path):
    """A limit on file size fails writes as a full disk does."""
    import resource

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = mlxlora(
        "quantize", "--model", dense_path, "--out", tmp_path / "q", preexec_fn=small_files
    )
    assert done.returncode == 2
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_chat_in_a_terminal(dense_path):
    pexpect = pytest.importorskip("pexpect")
    command = " ".join([*PROGRAM, "chat", "--model", str(dense_path), "--max-tokens", "5"])
    child = pexpect.spawn(command, encoding="utf-8", timeout=60, dimensions=(40, 100))
    child.expect("/help lists the commands")
    child.expect("> ")
    child.sendline("/help")
    child.expect("/reset")
    child.expect("> ")
    child.sendline("hello")
    child.expect("> ")
    child.sendline("/adapter /nowhere")
    child.expect("not an adapter directory")
    child.sendline("/nonsense")
    child.expect("no command /nonsense")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
