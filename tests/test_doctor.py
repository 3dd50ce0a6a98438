"""doctor: each check from facts, and the program on machines that lack something."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxlora import doctor
from mlxlora.doctor import Check
from mlxlora.selftest import Training, train_a_second

GOOD, BAD = Training(9, 6.2, 5.0, 1e4), Training(9, 6.2, 6.2, 1e4)
GIB = 1 << 30


@pytest.mark.parametrize(
    "check, state, says",
    [
        (doctor.check_python("3.12.1", ">=3.11", "arm64", "darwin"), "pass", "3.12.1"),
        (doctor.check_python("3.10.9", ">=3.11", "arm64", "darwin"), "fail", "Python >=3.11"),
        (doctor.check_python("3.12.1", ">=3.11", "x86_64", "darwin"), "fail", "Rosetta"),
        (doctor.check_version("mlx", "0.32.4", ">=0.32"), "pass", "0.32.4"),
        (doctor.check_version("mlx", "0.29.1", ">=0.32"), "fail", "pip install -U 'mlx>=0.32'"),
        (doctor.check_version("mlx", None, ">=0.32"), "fail", "not installed"),
        (doctor.check_version("mlx-lm", "0.40.0", ">=0.32"), "warn", "tested with 0.32"),
        (doctor.check_version("mlx", "0.32.5.dev1", ">=0.32"), "pass", "dev1"),
        (doctor.check_device("gpu", "Apple M4", "darwin"), "pass", "GPU (Apple M4)"),
        (doctor.check_device("cpu", "Apple M4", "darwin"), "fail", "no Metal device"),
        (doctor.check_device("cpu", "EPYC", "linux"), "warn", "mlxlora[cuda]"),
        (doctor.check_memory(16 * GIB, 9 * GIB, 0, 13 * GIB, 0), "pass", "17.2 GB"),
        (doctor.check_memory(16 * GIB, 2 * GIB, 0, 13 * GIB, 0), "warn", "close other programs"),
        (doctor.check_memory(16 * GIB, 9 * GIB, 11 * GIB, 1, 0), "pass", "as the system sets it"),
        (doctor.check_memory(16 * GIB, 9 * GIB, 11 * GIB, 1, 17_000), "warn", "freeze a Mac"),
        (doctor.check_products(1e11, True, "libopenblas.so.0", "linux"), "pass", "100 GFLOP/s"),
        (doctor.check_products(5e9, True, None, "linux"), "warn", "libopenblas0-pthread"),
        (doctor.check_products(1e13, False, None, "linux"), "pass", "10,000 GFLOP/s"),
        (doctor.check_disk("disk", "runs", 10**11), "pass", "100.0 GB free for runs"),
        (doctor.check_disk("disk", "runs", 10**10), "warn", "5 GB at 4 bits"),
        (doctor.check_disk("disk", "runs", 10**8), "fail", "make room"),
        (doctor.check_disk("disk", "runs", None), "warn", "network drive"),
        (doctor.check_hub("https://h", False, True, 200), "pass", "with a token"),
        (doctor.check_hub("https://h", False, False, 401), "pass", "without a token"),
        (doctor.check_hub("https://h", False, True, 401), "warn", "hf auth login"),
        (doctor.check_hub("https://h", False, True, 503), "warn", "answers 503"),
        (doctor.check_hub("https://h", False, False, "no route"), "warn", "no route"),
        (doctor.check_hub("https://h", True, False, 0), "warn", "unset HF_HUB_OFFLINE"),
        (doctor.check_cache("c", 10**10, True), "pass", "c, 10.0 GB"),
        (doctor.check_cache("c", None, True), "pass", "c, large"),
        (doctor.check_cache("c", None, False), "pass", "c, empty"),
        (doctor.check_training(GOOD), "pass", "loss 6.20 to 5.00 in 9 updates"),
        (doctor.check_training(BAD), "fail", "the loss should fall"),
        (doctor.check_training("RuntimeError: no"), "fail", "RuntimeError: no"),
        (doctor.check_power("Now drawing from 'Battery Power'"), "warn", "plug in"),
        (doctor.check_power("Now drawing from 'AC Power'"), "pass", "plugged in"),
    ],
)
def test_each_check_says_what_it_found_and_what_to_do(check: Check, state: str, says: str):
    assert check.state == state
    assert says in f"{check.found} | {check.remedy}"
    assert (check.remedy == "") == (state == "pass")


def test_the_self_test_learns():
    assert train_a_second().learns


def test_what_takes_too_long_or_fails_is_not_known():
    began = time.monotonic()
    assert doctor.within(0.05, lambda: time.sleep(1)) is None
    assert time.monotonic() - began < 0.9
    assert doctor.within(5, lambda: 1 / 0) is None
    assert doctor.within(5, lambda: 7) == 7


def run(cache: Path, *arguments: str, **environment: str) -> tuple[int, str, dict[str, dict]]:
    """(exit code, what was printed, name -> check) of the program, without this user's settings."""
    hidden = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"}
    own = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "mlxlora.cli", "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        env={**own, "HF_HOME": str(cache), **environment},
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    checks = {check.pop("name"): check for check in result["checks"]}
    assert result["ok"] == (done.returncode == 0)
    return done.returncode, done.stderr, checks


@pytest.mark.slow
def test_no_network_and_no_openblas_are_warnings(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "blob").write_bytes(b"x" * 1000)
    # A library of that name that is none hides the system's.
    (tmp_path / "lib").mkdir()
    for name in ("libopenblas.so.0", "libopenblas.so"):
        (tmp_path / "lib" / name).write_text("no library")
    code, shown, checks = run(
        tmp_path, HF_ENDPOINT="http://127.0.0.1:9", LD_LIBRARY_PATH=str(tmp_path / "lib")
    )
    assert code == 0
    assert checks["hub"]["state"] == "warn" and "is not reached" in checks["hub"]["found"]
    assert checks["training"]["state"] == "pass"
    if sys.platform == "linux" and "CPU" in checks["device"]["found"]:
        assert checks["products"]["state"] == "warn"
        assert "apt install libopenblas0-pthread" in checks["products"]["remedy"]
        assert "apt install libopenblas0-pthread" in shown
    assert {"python", "mlx", "mlx-lm", "memory", "disk", "hub disk", "hub cache"} <= set(checks)


@pytest.mark.slow
def test_a_server_that_never_answers_is_not_waited_for(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        _, _, checks = run(tmp_path, "--out", str(tmp_path / "no/such/run"), HF_ENDPOINT=endpoint)
    assert checks["hub"]["state"] == "warn" and "is not reached" in checks["hub"]["found"]
    assert checks["disk"]["state"] in ("pass", "warn")


def test_offline_asks_nobody(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        _, _, checks = run(tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
        with pytest.raises(TimeoutError):
            server.accept()
    assert checks["hub"]["found"] == "HF_HUB_OFFLINE is set"


def test_a_check_that_fails_is_exit_code_2(monkeypatch):
    from typer.testing import CliRunner

    from mlxlora.cli import app

    failed = Check("mlx", "fail", "0.1", "pip install -U mlx")
    monkeypatch.setattr(doctor, "examine", lambda out: iter([failed]))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 2
    assert "fail" in result.output and "pip install -U mlx" in result.output
