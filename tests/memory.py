"""What MLX holds, counted so that what earlier tests left behind cannot blur it."""

import gc
from collections.abc import Callable

import mlx.core as mx


def held() -> int:
    """Bytes of arrays that something can still reach."""
    gc.collect()  # models hold themselves in cycles; one freed later would count as ours
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


def peak(work: Callable[[], object]) -> int:
    """Bytes that this work holds at most beyond what is there before it."""
    before = held()
    mx.reset_peak_memory()
    work()
    mx.synchronize()
    return mx.get_peak_memory() - before
