"""Faults of a real process: killed anywhere, a full disk, no permission, signals."""

import fcntl
import gzip
import json
import multiprocessing
import os
import random
import resource
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from test_cli import mlxlora

from mlxlora.train.places import checkpoint_path

PROGRAM = [sys.executable, "-m", "mlxlora.cli"]
UPDATES = 36
# Most of the time goes into saving, so that most kills hit a save.
OPTIONS = [
    *("--rank", 4, "--batch-size", 4, "--updates", UPDATES, "--dropout", 0.1),
    *("--set", "save.every=1", "--set", "eval.every=7"),
]
KILLS = int(os.environ.get("MLXLORA_KILLS", "6"))  # of each way of training; more: all ways
WAYS: dict[str, tuple[str, ...]] = {
    "dropout": ("lora.dropout=0.1",),
    "padded, gzip, muon": ("train.packing=false", "train.optimizer=muon"),
    "checkpointed, lion": ("train.checkpoint_blocks=true", "train.optimizer=lion"),
    "every weight, adafactor": ("lora.method=full", "lora.rank=16", "train.optimizer=adafactor"),
    "small pieces, sgd": ("train.tokens_per_microbatch=24", "train.optimizer=sgd"),
}


def command(base, rows, out, *more) -> list:
    return ["train", "--model", base, "--data", rows, "--out", out, *OPTIONS, *more]


def started(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def updates(out) -> list[int]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["update"] for line in lines if line["event"] == "step"]


def weights(out) -> bytes:
    return (out / "adapter" / "adapters.safetensors").read_bytes()


def wait_for(out, update: int, process: subprocess.Popen) -> None:
    """Until the log has this update."""
    deadline = time.monotonic() + 120
    while f'"step", "update": {update},' not in read(out):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def read(out) -> str:
    log = out / "log.jsonl"
    return log.read_text() if log.exists() else ""


@pytest.fixture(scope="module")
def whole(dense_path, tmp_path_factory):
    """(rows, the directory of a run that nothing disturbed)."""
    rows = tmp_path_factory.mktemp("kill")
    pairs = [{"prompt": f"say {n}", "completion": str(n) * (1 + n % 7)} for n in range(50)]
    (rows / "train.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (rows / "valid.jsonl").write_text("\n".join(map(json.dumps, pairs[:6])))
    done = mlxlora(*command(dense_path, rows, rows / "whole"))
    assert done.returncode == 0, done.stderr
    return rows, rows / "whole"


def train_or_resume(directory: str, options: list[str]) -> None:
    """What a process that will be killed does: begin the run, or go on with it."""
    from pathlib import Path

    from mlxlora.config import RunConfig
    from mlxlora.train import loop

    out = Path(directory)
    begun = (out / "start.json").exists()
    events = loop.resume(out) if begun else loop.train(RunConfig.load(None, options))
    for _ in events:
        pass


@pytest.fixture(scope="module")
def fresh():
    """Starts a process that has everything imported and has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlxlora.train.loop"])

    def start(*arguments):
        process = context.Process(target=train_or_resume, args=arguments)
        process.start()
        return process

    return start


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS if KILLS > 6 else ["dropout"])
def test_killed_at_random_moments_again_and_again(dense_path, whole, fresh, tmp_path, name):
    rows = whole[0]
    if "gzip" in name:
        content = gzip.compress((rows / "train.jsonl").read_bytes())
        rows = tmp_path / "rows.jsonl.gz"
        rows.write_bytes(content)
    length = max(60, 12 * KILLS)
    given = [f"model={dense_path}", f"data.path={rows}", "lora.rank=4", "save.every=1"]
    given += ["train.batch_size=4", "eval.every=7", f"train.updates={length}", *WAYS[name]]
    out = tmp_path / "run"
    undisturbed = fresh(str(tmp_path / "whole"), [*given, f"out={tmp_path / 'whole'}"])
    undisturbed.join()
    draw = random.Random(int(os.environ.get("MLXLORA_SEED", "0")))
    kills = saving = 0
    while kills < KILLS:
        process = fresh(str(out), [*given, f"out={out}"])
        if not killed_in_training(process, out, draw):
            break  # it was faster than we are
        kills += 1
        saving += any(out.glob(".*")) or any(out.glob("checkpoints/.*"))
    last = fresh(str(out), [*given, f"out={out}"])
    last.join()
    assert last.exitcode == 0
    print(f"{name}: {kills} kills, {saving} of them in the middle of a save")
    assert kills == KILLS
    assert json.loads(read(out).splitlines()[-1])["reason"] == "finished"
    assert weights(out) == weights(tmp_path / "whole")
    assert updates(out) == list(range(1, length + 1))
    assert not [*out.glob(".*"), *out.glob("checkpoints/.*")]


def killed_in_training(process, out, draw: random.Random) -> bool:
    """Kill it a random moment after it began to log; False if it ended before."""
    before = read(out)
    deadline = time.monotonic() + 60
    while process.is_alive() and read(out) == before and time.monotonic() < deadline:
        time.sleep(0.003)
    time.sleep(draw.uniform(0, 0.2))
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, dense_path, whole, tmp_path):
    rows, undisturbed = whole
    out = tmp_path / "run"
    process = started(*command(dense_path, rows, out))
    wait_for(out, 9, process)
    process.send_signal(number)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 3, error
    assert f"mlxlora resume {out}" in " ".join(said.split())
    done = mlxlora("resume", out, "--json")
    assert done.returncode == 0, done.stderr
    assert weights(out) == weights(undisturbed)
    assert updates(out) == list(range(1, UPDATES + 1))


def test_a_closed_terminal_saves_and_the_run_can_go_on(dense_path, whole, tmp_path):
    out = tmp_path / "run"
    near, far = os.openpty()
    words = [*PROGRAM, *map(str, command(dense_path, whole[0], out, "--updates", 100_000))]
    process = subprocess.Popen(
        words, stdin=far, stdout=far, stderr=far, start_new_session=True, preexec_fn=own_terminal
    )
    os.close(far)
    while '"step", "update": 9,' not in read(out):
        if select.select([near], [], [], 0.05)[0]:
            os.read(near, 4096)
        assert process.poll() is None
    os.close(near)  # the system hangs up: SIGHUP, and nothing can be shown any more
    assert process.wait(timeout=60) == 3
    last = json.loads(read(out).splitlines()[-1])
    assert last["reason"] == "interrupted"
    assert checkpoint_path(out, last["update"]).is_dir()


def own_terminal() -> None:
    """Make the terminal on stdin the one whose closing hangs up on us."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, as it should
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_full_disk_stops_the_run_and_loses_nothing(dense_path, whole, tmp_path):
    """No file may grow as large as a checkpoint's: a limit fails writes as a full disk does."""
    rows, undisturbed = whole
    limit = max(file.stat().st_size for file in checkpoint_path(undisturbed, UPDATES).iterdir())

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit - 1000, limit - 1000))

    out = tmp_path / "run"
    done = mlxlora(*command(dense_path, rows, out), preexec_fn=small_files)
    assert done.returncode == 2
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert f"mlxlora resume {out}" in " ".join(done.stdout.split())
    done = mlxlora("resume", out, "--json")
    assert done.returncode == 0, done.stderr
    assert weights(out) == weights(undisturbed)
    assert updates(out) == list(range(1, UPDATES + 1))


def as_anyone():
    """Root, too, is bound by permissions without this capability (Linux)."""
    import ctypes

    drop_from_bounding_set, dac_override = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="drops a capability of Linux")
def test_a_directory_that_cannot_be_written_is_one_message(dense_path, whole, tmp_path):
    rows, _ = whole
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    done = mlxlora(*command(dense_path, rows, closed / "run"), preexec_fn=as_anyone)
    assert done.returncode == 2
    assert f"cannot write: {closed}" in done.stderr and "Traceback" not in done.stderr
    assert not list(closed.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="drops a capability of Linux")
@pytest.mark.slow
def test_a_run_whose_directory_is_closed_later_can_go_on(dense_path, whole, tmp_path):
    rows, undisturbed = whole
    out = tmp_path / "run"
    process = started(*command(dense_path, rows, out))
    wait_for(out, 5, process)
    process.kill()
    process.communicate()
    (out / "checkpoints").chmod(0o555)
    done = mlxlora("resume", out, preexec_fn=as_anyone)
    assert done.returncode == 2
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr
    (out / "checkpoints").chmod(0o755)
    done = mlxlora("resume", out)
    assert done.returncode == 0, done.stderr
    assert weights(out) == weights(undisturbed)


def test_another_base_under_the_same_name_is_refused(dense_path, whole, tmp_path):
    import shutil

    import mlx.core as mx

    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(dense_path, base)
    process = started(*command(base, whole[0], out))
    wait_for(out, 3, process)
    process.kill()
    process.communicate()
    weights = mx.load(str(base / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] + 0.1
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})
    done = mlxlora("resume", out)
    assert done.returncode == 2
    assert "other weights" in done.stderr
