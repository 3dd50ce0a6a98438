"""Memory: what the machine offers, what MLX and the process hold, and limits for MLX.

What is said of Metal comes from MLX's documentation and source; it was not run on a Mac.
"""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlxlora.errors import ConfigError
from mlxlora.machine import on_cpu

USABLE_SHARE = 0.85  # of the memory offered; the rest is the system's
CPU_CACHE = 32 << 20  # bytes of freed arrays that MLX keeps on the CPU, its own default
CACHE_SHARE = 1 / 16  # of the budget, on a GPU
HEADROOM = 1.25  # of what is needed, before MLX is asked to wait for what it has begun
WIRED_MARGIN = 256 << 20  # beside the weights, for what every step uses
RUSAGE_INFO_V4 = 4  # sys/resource.h
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h


def memory_budget() -> int:
    """Bytes that training may hold: most of what the GPU recommends, or of what is free.

    On a Mac the recommended working set (about three quarters of the memory) is what Metal
    keeps resident; on CUDA it is the device's memory; on the CPU what MLX holds and what is free.
    """
    return int(USABLE_SHARE * offered_memory())


def offered_memory() -> int:
    """Bytes that the machine offers, the system's share included."""
    import mlx.core as mx

    if on_cpu():
        held = mx.get_active_memory()  # by the model, and part of what it may hold
        return _available_memory() + held
    info = mx.device_info()
    for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if name in info:
            return int(info[name])
    return 10 << 30


def _available_memory() -> int:
    """Bytes of this machine's memory that are not in use, as far as the system tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_pages() -> None:
    """On Linux with the CPU, let the C library keep freed memory for the next step.

    It would hand arrays above 32 MB back to the system and get them as fresh pages again; a
    twentieth of an update's time, measured. The process keeps up to 2 GB that it once needed.
    """
    if sys.platform != "linux" or not on_cpu():
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def peak_memory() -> int:
    """Bytes MLX held at most since the start or the last reset."""
    import mlx.core as mx

    return int(mx.get_peak_memory())


def cache_limit(budget: int) -> int:
    """Bytes of freed arrays that MLX may keep for the next ones, beside what is in use."""
    return CPU_CACHE if on_cpu() else int(CACHE_SHARE * budget)


@contextmanager
def limits(needed_bytes: int, weight_bytes: int) -> Iterator[None]:
    """MLX's limits for a run that needs so many bytes, its weights among them; undone at the end.

    The memory limit fails nothing: beyond it MLX waits for what it has begun before it begins
    more, and lets its cache go (transforms.cpp and metal/allocator.cpp of MLX 0.32). So a
    forecast that was too low costs time at most. The cache is kept to a fraction of the budget.
    On a Mac the weights and a margin are wired, never more than the system recommends: wiring
    all that is recommended is reported to freeze machines of 16 GB. Wiring needs macOS 15; it
    and all else here that concerns Metal was not run on a Mac.
    """
    import mlx.core as mx

    offered = offered_memory()
    memory = mx.set_memory_limit(min(int(HEADROOM * needed_bytes), offered))
    cache = None if on_cpu() else mx.set_cache_limit(cache_limit(memory_budget()))
    wired = _wire(min(weight_bytes + WIRED_MARGIN, offered))
    try:
        yield
    finally:
        mx.set_memory_limit(memory)
        if cache is not None:
            mx.set_cache_limit(cache)
        if wired is not None:
            _wire(wired)


def _wire(size: int) -> int | None:
    """Keep so many bytes resident on Metal; returns how many it was, None where that is not so."""
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    try:
        return int(mx.set_wired_limit(size))
    except (RuntimeError, ValueError):  # before macOS 15, or more than the system allows
        return None


UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}


def parse_size(text: str, where: str) -> int:
    """Bytes of a size such as 16GB (powers of 1000), 16GiB (of 1024) or 512MB.

    Raises ConfigError, naming where the text stands.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    size = 0.0
    if match and (match[2] or not match[3]):
        unit = UNITS[match[2]]
        size = float(match[1]) * (2 ** (10 * list(UNITS).index(match[2])) if match[3] else unit)
    if not 1 <= size < 1 << 60:
        raise ConfigError(f"{where} {text[:40]!r}: write a size such as 16GB, 16GiB or 512MB")
    return int(size)


@dataclass(frozen=True)
class Footprint:
    """Bytes of the whole process, Python and the C library included; 0 where it is not told."""

    now: int
    most: int  # since the process began


def footprint() -> Footprint:
    """The process's own memory, as the system counts it.

    Linux: resident bytes. macOS: the physical footprint, which Activity Monitor shows and the
    system judges by; read by proc_pid_rusage, and not run on a Mac.
    """
    if sys.platform == "darwin":
        return _footprint_of_mac()
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        return Footprint(*(int(fields[n].split()[0]) * 1024 for n in ("VmRSS", "VmHWM")))
    except (OSError, KeyError, ValueError):
        return Footprint(0, 0)


class _RusageInfo(ctypes.Structure):
    """struct rusage_info_v4 of sys/resource.h."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        ("before_footprint", ctypes.c_uint64 * 7),  # times, wakeups, pageins, wired, resident
        ("phys_footprint", ctypes.c_uint64),
        ("between", ctypes.c_uint64 * 20),
        ("lifetime_max_phys_footprint", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 6),
    )


def _footprint_of_mac() -> Footprint:
    info = _RusageInfo()
    try:
        asked = ctypes.CDLL(None).proc_pid_rusage(os.getpid(), RUSAGE_INFO_V4, ctypes.byref(info))
    except (OSError, AttributeError):
        asked = -1
    if asked != 0:
        return Footprint(0, 0)
    return Footprint(info.phys_footprint, info.lifetime_max_phys_footprint)
