"""What this machine offers: the BLAS it multiplies with, its device and number types.

Every choice that depends on the device is made here or asked for here. What is said of
Metal comes from MLX's documentation and source; it was not run on a Mac.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOG2_E = 1.4426950408889634
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


def prefill_tokens() -> int:
    """Tokens of a prompt that are computed at once while others wait for their next token.

    Enough to fill the device's matrix units; a small Mac computes a few hundred a second.
    """
    return 512


def compiles() -> bool:
    """Whether training steps are compiled: not on the CPU.

    There MLX runs g++ for every fused kernel that this machine has not met, up to a minute in
    all. Without traces to spare, micro-batches may have exactly the sizes of their rows.
    """
    return not on_cpu()


def block_bytes() -> int:
    """Size of the largest temporary array of an algorithm that works in blocks.

    On the CPU it should stay in the cache and below 32 MB, from where on the C library asks
    the system for fresh pages every time (ten times slower to write). A GPU wants more work
    at once, and an 8 GB machine no more than this.
    """
    return (16 << 20) if on_cpu() else (64 << 20)


def products_known() -> bool:
    """Whether widening quantized weights is known to be the faster way to train: on the CPU.

    There it is many times as fast, and a race could only be lost by chance, to other work.
    """
    return on_cpu()


def tile_queries() -> int:
    """Queries that attention by tiles takes at once: few skip more of what is masked."""
    return 64 if on_cpu() else 256


def lean_attention_pays(length: int, packed: bool) -> bool:
    """Whether attention by tiles beats MLX's own when training on sequences of this length.

    On the CPU always. On a GPU, MLX's stores L x L scores per head and block under
    differentiation, and packed rows would need an L x L mask; from some length on that is
    worse than more kernels. (CUDA's fused kernel wants what we cannot promise: f16 or bf16
    and lengths in multiples of 128.)
    """
    return on_cpu() or length >= (512 if packed else 1024)


def exp(x: Any) -> Any:
    """exp(x), float32. On the CPU MLX's power is 2.5 times as fast as its exp."""
    import mlx.core as mx

    return mx.power(2.0, x * LOG2_E) if on_cpu() else mx.exp(x)


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
