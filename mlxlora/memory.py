"""Memory: what the machine offers, what MLX holds, what the C library keeps.

What is said of Metal comes from MLX's documentation and source; it was not run on a Mac.
"""

import ctypes
import sys

from mlxlora.machine import on_cpu

USABLE_SHARE = 0.85  # of the memory offered; the rest is the system's
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h


def memory_budget() -> int:
    """Bytes that training may hold: most of what the GPU recommends, or of what is free.

    On a Mac the recommended working set (about three quarters of the memory) is what Metal
    keeps resident; on CUDA it is the device's memory; on the CPU what MLX holds and what is free.
    """
    import mlx.core as mx

    if on_cpu():
        held = mx.get_active_memory()  # by the model, and part of what it may hold
        return int(USABLE_SHARE * (_available_memory() + held))
    info = mx.device_info()
    for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if name in info:
            return int(USABLE_SHARE * int(info[name]))
    return 8 << 30


def _available_memory() -> int:
    """Bytes of this machine's memory that are not in use, as far as the system tells."""
    import os

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
