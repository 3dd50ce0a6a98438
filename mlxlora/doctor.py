"""What this machine offers and what is missing: each check a function of facts -> Check.

examine() gathers the facts, one after another, and none of it takes long: whatever could wait
for the network, a slow disk or another program has a limit of a few seconds and then counts as
not known. What only a Mac has (Metal's working set, the wired limit, the battery) is read as
Apple and MLX document it; it was not run on a Mac.
"""

import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any, Literal

State = Literal["pass", "warn", "fail"]

PATIENCE = 3.0  # seconds for the Hub, and for each other thing that may hang
TESTED = {"mlx": "0.32", "mlx-lm": "0.32"}  # mlxlora's own tests ran with these
GB = 1e9
DISK_WARN, DISK_FAIL = 20 * GB, 1 * GB  # a 4-bit 8B base is 5 GB; fused unquantized, 16 GB
MEMORY_WARN = 4 * GB  # for training; a 4-bit 1B base with short rows fits


@dataclass(frozen=True)
class Check:
    """One thing looked at. remedy is what to do, or "" where nothing is wrong."""

    name: str
    state: State
    found: str
    remedy: str = ""


def check_python(found: str, wanted: str, machine: str, system: str) -> Check:
    """found: "3.12.1"; wanted: a specifier (">=3.11"); machine and system as platform says."""
    from packaging.specifiers import SpecifierSet

    text = f"{found}, {machine}"
    if found not in SpecifierSet(wanted):
        return Check("python", "fail", text, f"use Python {wanted}")
    if system == "darwin" and machine != "arm64":
        remedy = "MLX needs Apple silicon and an arm64 Python; this one runs under Rosetta"
        return Check("python", "fail", text, remedy)
    return Check("python", "pass", text)


def check_version(name: str, found: str | None, wanted: str) -> Check:
    """found: the installed version, None if there is none; wanted: a specifier (">=0.32")."""
    from packaging.specifiers import SpecifierSet

    install = f"pip install -U '{name}{wanted}'"
    if found is None:
        return Check(name, "fail", "not installed", install)
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return Check(name, "fail", f"{found}, and {wanted} is needed", install)
    tested = TESTED[name]
    if not SpecifierSet(f"=={tested}.*").contains(found, prereleases=True):
        remedy = f"should anything be odd: pip install '{name}=={tested}.*'"
        return Check(name, "warn", f"{found}; mlxlora was tested with {tested}", remedy)
    return Check(name, "pass", found)


def check_device(kind: str, name: str, system: str) -> Check:
    """kind: "gpu" or "cpu", MLX's default device; name as MLX gives it."""
    if kind == "cpu" and system == "darwin":
        remedy = "MLX finds no Metal device: use macOS 14 or newer on Apple silicon, not in a VM"
        return Check("device", "fail", f"CPU ({name})", remedy)
    if kind == "cpu":
        remedy = "enough for small models; with an NVIDIA GPU: pip install 'mlxlora[cuda]'"
        return Check("device", "warn", f"CPU ({name})", remedy)
    return Check("device", "pass", f"GPU ({name})")


def check_memory(total: int, usable: int, recommended: int, limit: int, wired_mb: int) -> Check:
    """Bytes: of the machine, what training may hold, Metal's recommended working set (0: no
    Metal), MLX's limit; wired_mb is iogpu.wired_limit_mb (0: the system's choice).
    """
    parts = [f"{_size(total)}, training may hold {_size(usable)}"]
    if recommended:
        parts.append(f"Metal recommends at most {_size(recommended)}")
        parts.append(f"wired limit {f'{wired_mb:,} MB' if wired_mb else 'as the system sets it'}")
    parts.append(f"MLX's limit {_size(limit)}")
    text = "; ".join(parts)
    if wired_mb and wired_mb * 1e6 > 0.9 * total:
        remedy = "wiring nearly all memory can freeze a Mac: sudo sysctl iogpu.wired_limit_mb=0"
        return Check("memory", "warn", text, remedy)
    if usable < MEMORY_WARN:
        return Check("memory", "warn", text, "close other programs, or train a small 4-bit base")
    return Check("memory", "pass", text)


def check_products(rate: float, cpu: bool, blas: str | None, system: str) -> Check:
    """rate: float32 operations per second of a matrix product; blas: the OpenBLAS loaded."""
    text = f"{rate / 1e9:,.0f} GFLOP/s for matrices in float32"
    if not cpu or system != "linux":
        return Check("products", "pass", text)
    if blas is None:
        remedy = "apt install libopenblas0-pthread makes training 25 to 50 times faster"
        return Check("products", "warn", f"{text}, without OpenBLAS", remedy)
    return Check("products", "pass", f"{text}, with OpenBLAS")


def check_disk(name: str, path: str, free: int | None) -> Check:
    """free: bytes, None if the disk did not answer."""
    if free is None:
        return Check(name, "warn", f"{path}: no answer", "is it a network drive that is away?")
    text = f"{_size(free)} free for {path}"
    if free < DISK_FAIL:
        return Check(name, "fail", text, "make room: even a small base and its adapter need 1 GB")
    if free < DISK_WARN:
        return Check(name, "warn", text, "an 8B base takes 5 GB at 4 bits, unquantized 16 GB")
    return Check(name, "pass", text)


def check_hub(endpoint: str, offline: bool, token: bool, answer: int | str) -> Check:
    """answer: the HTTP status of asking who we are, or why there was none."""
    if offline:
        remedy = "only what the cache holds is found; unset HF_HUB_OFFLINE to fetch"
        return Check("hub", "warn", "HF_HUB_OFFLINE is set", remedy)
    if isinstance(answer, str):
        remedy = "models in the cache and in directories still work; check network and proxy"
        return Check("hub", "warn", f"{endpoint} is not reached: {answer}", remedy)
    if answer >= 500:
        return Check("hub", "warn", f"{endpoint} answers {answer}", "try again later")
    if token and answer in (401, 403):
        return Check("hub", "warn", f"{endpoint} refuses the token", "hf auth login")
    who = "with a token" if token else "without a token (public models need none)"
    return Check("hub", "pass", f"{endpoint} answers, {who}")


def check_cache(path: str, size: int | None, exists: bool) -> Check:
    """size: bytes of the Hub's cache, None if it takes too long to tell."""
    if not exists:
        return Check("hub cache", "pass", f"{path}, empty")
    return Check("hub cache", "pass", f"{path}, {_size(size) if size is not None else 'large'}")


def check_training(result: Any) -> Check:
    """result: selftest.Training, or why there is none."""
    if isinstance(result, str):
        return Check("training", "fail", result, "pip install --force-reinstall mlx mlx-lm mlxlora")
    text = f"loss {result.before:.2f} to {result.after:.2f} in {result.updates} updates of a tiny "
    text += f"model, {result.rate:,.0f} tokens/s"
    if not result.learns:
        return Check("training", "fail", text, "the loss should fall: is MLX's build for this CPU?")
    return Check("training", "pass", text)


def check_power(report: str) -> Check:
    """report: what `pmset -g batt` prints."""
    if "Battery Power" in report:
        return Check("power", "warn", "on battery", "plug in: a Mac on battery is slower")
    return Check("power", "pass", "plugged in")


def examine(runs: Path) -> Iterator[Check]:
    """Look at everything, yielding each check when it is done. runs: where runs would go."""
    system = sys.platform
    wanted_python = metadata("mlxlora")["Requires-Python"]
    yield check_python(platform.python_version(), wanted_python, platform.machine(), system)
    for name in TESTED:
        yield check_version(name, _installed(name), _needed(name))
    if _installed("mlx") is not None and _installed("mlx-lm") is not None:
        yield from _examine_mlx(system)
    yield from _examine_places(runs)
    if system == "darwin":
        yield check_power(_output("pmset", "-g", "batt"))


def _examine_mlx(system: str) -> Iterator[Check]:
    try:
        import mlx.core as mx

        from mlxlora.bench.limit import matrix_rate
        from mlxlora.machine import on_cpu
        from mlxlora.memory import memory_budget
        from mlxlora.selftest import train_a_second
    except ImportError as error:
        yield Check("device", "fail", f"MLX does not load: {error}", "pip install -U mlx mlx-lm")
        return
    info, cpu = mx.device_info(), on_cpu()
    yield check_device("cpu" if cpu else "gpu", str(info.get("device_name", "unnamed")), system)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    recommended = int(info.get("max_recommended_working_set_size", 0))
    wired = _output("sysctl", "-n", "iogpu.wired_limit_mb") if system == "darwin" else ""
    limits = mx.get_memory_limit(), int(wired) if wired.strip().isdigit() else 0
    yield check_memory(total, memory_budget(), recommended, *limits)
    yield check_products(matrix_rate(mx.float32), cpu, _openblas(), system)
    try:
        result: Any = train_a_second()
    except Exception as error:  # whatever it is, it is what the user should be told
        result = f"{type(error).__name__}: {str(error)[:200]}"
    yield check_training(result)


def _examine_places(runs: Path) -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    yield check_disk("disk", str(runs.absolute()), within(PATIENCE, lambda: _free(runs)))
    yield check_disk("hub disk", str(cache), within(PATIENCE, lambda: _free(cache)))
    yield check_cache(str(cache), within(PATIENCE, lambda: _bytes_in(cache)), cache.is_dir())
    offline = bool(constants.HF_HUB_OFFLINE)
    answer: int | str = 0 if offline else _ask_hub(constants.ENDPOINT)
    yield check_hub(constants.ENDPOINT, offline, get_token() is not None, answer)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What work() returns, or None if it fails or takes longer; then nobody waits for it."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception:  # not known, whatever the reason
            found.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _ask_hub(endpoint: str) -> int | str:
    """The status of one request, or why there was none, within PATIENCE."""
    from huggingface_hub import utils

    hub: Any = utils  # what is used of it is public, but not marked so

    def ask() -> int | str:
        try:
            own = hub.build_hf_headers()  # the token among them
            url = f"{endpoint}/api/whoami-v2"
            response = hub.get_session().get(url, headers=own, timeout=PATIENCE)
        except Exception as error:  # of the HTTP library that huggingface-hub uses
            return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        return int(response.status_code)

    answer: int | str | None = within(PATIENCE, ask)
    return f"no answer in {PATIENCE:g} s" if answer is None else answer


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _needed(name: str) -> str:
    """The range of versions that this mlxlora was built to need, e.g. ">=0.32"."""
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in requires("mlxlora") or ()]
    return next(str(r.specifier) for r in needed if r.name == name and r.marker is None)


def _openblas() -> str | None:
    """The OpenBLAS that this process has loaded."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return next((name for line in maps.splitlines() if "libopenblas" in (name := line[73:])), None)


def _free(path: Path) -> int:
    """Bytes free where path is, or would be."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def _bytes_in(directory: Path) -> int:
    """Bytes of the files below, links not followed."""
    total = 0
    for folder, _, names in os.walk(directory):
        total += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
    return total


def _output(*command: str) -> str:
    """What a system tool prints, "" if it is not there or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _size(count: int) -> str:
    return f"{count / GB:,.1f} GB"
