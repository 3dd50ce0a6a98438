"""A run whose process dies is started again; one that ends by itself is not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_kill import UPDATES, command, read, started, updates, weights, whole  # noqa: F401

from mlxlora.train.supervise import Child, supervise, why


@pytest.mark.parametrize(
    "code, tail, kills, says, memory",
    [
        (-9, "", 1, "the system ended it because memory ran out", True),
        (-9, "", -1, "because memory ran out, most likely", True),
        (-9, "", 0, "from outside (SIGKILL)", False),
        (
            -6,
            "… Impacting Interactivity (0000000e:kIO…ErrorImpactingInteractivity)",
            0,
            "screen",
            False,
        ),
        (
            -6,
            "Insufficient Memory (…CallbackErrorOutOfMemory)",
            0,
            "the GPU ran out of memory",
            True,
        ),
        (
            -6,
            "Caused GPU Timeout Error (…kIOGPUCommandBufferCallbackErrorTimeout)",
            0,
            "watchdog",
            False,
        ),
        (-6, "", 0, "MLX aborted it", False),
        (-11, "", 0, "invalid memory access", False),
        (1, "RuntimeError: [malloc] Unable to allocate 12 bytes.", 0, "memory ran out", True),
    ],
)
def test_the_cause_is_named_in_plain_words(code, tail, kills, says, memory):
    death = why(code, tail, kills, finished=False)
    assert death is not None and says in death.cause and death.memory is memory


@pytest.mark.parametrize("code", [1, 2, 3, 130, -2, -15, -1])
def test_errors_and_interruptions_are_no_deaths(code):
    assert why(code, "Traceback: something", 0, finished=False) is None


@pytest.mark.parametrize("code", [2, 3])
def test_what_a_child_tells_of_an_earlier_death_is_no_death(code):
    assert why(code, "note: the GPU ran out of memory", 0, finished=False) is None


def test_only_the_last_words_count():
    said = "RuntimeError: [malloc] Unable to allocate\n" + "progress\n" * 40
    assert why(-6, said, 0, finished=False).cause == "MLX aborted it"


def test_a_child_without_an_end_is_lost():
    assert why(0, "", 0, finished=True) is None
    assert "lost" in why(0, "", 0, finished=False).cause


def children(out: Path) -> list[int]:
    """Processes that train in this directory, the supervisor not included."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        words = place.read_bytes().decode().split("\0") if place.exists() else []
        if str(out) in words and "--no-supervise" in words:
            found.append(int(place.parent.name))
    return found


def kill_child(out: Path, update: int, process: subprocess.Popen, number: int) -> None:
    deadline = time.monotonic() + 120
    while f'"step", "update": {update},' not in read(out):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for pid in children(out):
        os.kill(pid, number)


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the child in /proc")


@needs_proc
@pytest.mark.slow
def test_a_killed_child_is_replaced_and_the_result_is_the_same(dense_path, whole, tmp_path):  # noqa: F811
    rows, undisturbed = whole
    out = tmp_path / "run"
    process = started(*command(dense_path, rows, out), "--supervise", "--json")
    kill_child(out, 11, process, signal.SIGKILL)
    kill_child(out, 22, process, signal.SIGSEGV)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert json.loads(said.splitlines()[-1])["reason"] == "finished"
    assert "from outside (SIGKILL)" in error and "invalid memory access" in error
    assert weights(out) == weights(undisturbed)
    assert updates(out) == list(range(1, UPDATES + 1))
    notes = [json.loads(x)["notes"] for x in read(out).splitlines() if '"resumed"' in x]
    assert any("SIGKILL" in note for note in notes[0])


@needs_proc
def test_an_interrupted_supervisor_interrupts_its_child_once(dense_path, whole, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    process = started(*command(dense_path, whole[0], out), "--supervise")
    kill_child(out, 5, process, 0)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 3, error
    assert "mlxlora resume" in said and "Stopped at once" not in said
    assert not children(out)


def scripted(tmp_path: Path, text: str) -> tuple[Child, Path]:
    """A stand-in for the program: it is told whether it begins or goes on, and its run."""
    program = tmp_path / "program.py"
    program.write_text("import os, sys, pathlib, signal\nrun = pathlib.Path(sys.argv[2])\n" + text)
    run = tmp_path / "run"
    words = [sys.executable, str(program)]
    return Child([*words, "begin", str(run)], [*words, "again", str(run)]), run


ALWAYS_DIES = """
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "start.json").touch()
with (run / "calls").open("a") as file: file.write(" ".join(sys.argv[3:]) + "|")
os.kill(os.getpid(), signal.SIGABRT)
"""
ADVANCES = """
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "start.json").touch()
count = len(list((run / "checkpoints").iterdir()))
if count == 5:
    (run / "log.jsonl").write_text('{"event": "done"}')
    sys.exit(0)
(run / "checkpoints" / f"step-{count + 1:08d}").mkdir()
with (run / "calls").open("a") as file: file.write(" ".join(sys.argv[3:]) + "|")
print("[malloc] Unable to allocate 5 bytes", file=sys.stderr)
sys.exit(1)
"""


def test_dying_without_getting_further_is_given_up(tmp_path, capfd):
    child, run = scripted(tmp_path, ALWAYS_DIES)
    assert supervise(child, run) == 3
    # The second time it is given less at once, whatever it died of.
    smaller = ["--smaller" in call for call in (run / "calls").read_text().split("|")]
    assert smaller[:-1] == [False, False, True]
    said = capfd.readouterr().err
    assert "3 times in a row without getting further" in said and "mlxlora resume" in said


def test_a_run_that_gets_further_is_started_again_as_often_as_it_takes(tmp_path, capfd):
    child, run = scripted(tmp_path, ADVANCES)
    assert supervise(child, run) == 0
    calls = (run / "calls").read_text().split("|")[:-1]
    assert len(calls) == 5
    assert all("--smaller" in call for call in calls[1:])  # died by memory
    assert "memory ran out" in capfd.readouterr().err


STOPS_BADLY = """
import time
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: os.abort())
(run / "start.json").touch()
time.sleep(60)
"""


def test_a_run_that_was_to_stop_is_not_started_again(tmp_path, capfd):
    child, run = scripted(tmp_path, STOPS_BADLY)

    def stop():
        while not (run / "start.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert supervise(child, run) == 3
    assert "not started again" in capfd.readouterr().err


def test_dying_before_the_run_began_is_not_tried_again(tmp_path, capfd):
    child, run = scripted(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert supervise(child, run) == 2
    assert "before the run began" in capfd.readouterr().err


def test_the_parent_stays_small():
    code = (
        "import sys, mlxlora.train.supervise, mlxlora.verbs.running\n"
        "heavy = {'mlx.core', 'mlx_lm', 'transformers', 'numpy', 'rich.live'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
