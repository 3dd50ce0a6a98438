"""What this machine offers: the BLAS it multiplies with, its device and number types.

Every choice that depends on the device is made here or asked for here. What is said of
Metal comes from MLX's documentation and source; it was not run on a Mac.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The mlx[cpu] wheel multiplies with a reference BLAS, 25 to 50 times slower than OpenBLAS.
OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")


def load_openblas() -> str | None:
    """On Linux, make the system's OpenBLAS the BLAS of MLX; return its name, or None.

    Only works before mlx is first imported (its symbols must be found first). Without
    OpenBLAS everything still works, slowly.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    for name in OPENBLAS_NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here (no Metal or CUDA device)."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.cpu)


def compute_dtype() -> Any:
    """The dtype base weights are loaded in, or None for their own.

    On the CPU, half precision products avoid BLAS and are about 20 times slower than
    float32, so a base is widened on load. On a GPU it stays as it is on disk.
    """
    import mlx.core as mx

    return mx.float32 if on_cpu() else None


def token_budget() -> int:
    """Tokens per micro-batch when the user names none.

    Enough to fill the device's matrix units, little enough for a 16 GB machine and a
    vocabulary of 150,000.
    """
    return 2048 if on_cpu() else 4096


def compile_from() -> int:
    """The update from which training steps are compiled: the first, except on the CPU.

    There MLX runs g++ for every fused kernel that this machine has not met, up to a minute
    in all, and the kernels then save a sixth of an update.
    """
    return 500 if on_cpu() else 1


def peak_memory() -> int:
    """Bytes MLX held at most since the start or the last reset."""
    import mlx.core as mx

    return int(mx.get_peak_memory())


@contextmanager
def awake() -> Iterator[None]:
    """Keep a Mac awake (the screen may sleep) while the block runs; nothing elsewhere."""
    if sys.platform != "darwin":
        yield
        return
    import os
    import subprocess

    process = subprocess.Popen(["/usr/bin/caffeinate", "-is", "-w", str(os.getpid())])
    try:
        yield
    finally:
        process.terminate()
        process.wait()
