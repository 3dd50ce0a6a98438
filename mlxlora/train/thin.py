"""A model made thin for a while: a few of its blocks and a few of its words, then itself again.

What a step holds and how long it takes grows in step with the number of blocks, so a few blocks
of the real sizes tell what all of them need. Of a skeleton, whose weights must not be loaded, the
few that take part are made up: zeros to measure with, which cost next to nothing to make, or
views of a small pool of random numbers to try the model's behaviour with, which cost nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxlora.lora.layers import EMBEDDING, LINEAR, LowRank
from mlxlora.quantized import QUANTIZED, output_rows
from mlxlora.train.recompute import trained_blocks

Fill = Callable[[mx.array], mx.array]
STRIDES = (13, 7, 1)  # of made-up weights, in their pool: all rows differ


def kinds_of_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks that are differentiated, grouped by what they are made of, most frequent first."""
    blocks = trained_blocks(model)
    signs = [_signature(block) for block in blocks]
    order = [sign for sign, _ in Counter(signs).most_common()]
    return [[b for b, s in zip(blocks, signs, strict=True) if s == sign] for sign in order]


def _signature(block: nn.Module) -> Any:
    arrays = tree_flatten(block.parameters())
    return type(block), tuple(sorted((path, a.shape, str(a.dtype)) for path, a in arrays))


@contextmanager
def thin(
    model: nn.Module, blocks: Sequence[nn.Module], words: int, fill: Fill | None = None
) -> Iterator[None]:
    """Inside, the model has only these blocks and its first words; then what it had before.

    words: rows that embedding and head keep. fill: makes the weights up, from those they stand
    for. Whatever is trained inside is undone too.
    """
    before = tree_flatten(model.parameters())
    holder, name = _holder(model)
    own_blocks: list[nn.Module] = holder[name]
    # An adapter over the embedding or the head is as long as they are: those stay whole.
    around = [*own_blocks, *(m for m in model.modules() if isinstance(m, LowRank))]
    outside = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LINEAR + EMBEDDING) and not _within(module, around)
    }
    cut = [(p, output_rows(m, 0, words)) for p, m in outside.items() if m.weight.shape[0] > words]
    holder[name] = list(blocks)
    kept = [(m, m._kept) for m in model.modules() if isinstance(m, QUANTIZED) and "_kept" in m]
    model.update_modules(tree_unflatten(cut))
    try:
        if fill is not None:
            model.update(tree_map(fill, model.parameters()))
            for module in model.modules():
                if "_kept" in module:
                    module._kept = fill(module._kept)
        yield
    finally:
        holder[name] = own_blocks
        model.update_modules(tree_unflatten([(path, outside[path]) for path, _ in cut]))
        model.update(tree_unflatten(before))
        for module, array in kept:
            module._kept = array


def _holder(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of blocks, and under which name."""
    first = model.layers[0]
    for module in model.modules():
        for name, value in module.items():
            if isinstance(value, list) and value and value[0] is first:
                return module, name
    raise ValueError("the model's blocks are in no list")


def words_of(model: nn.Module) -> int:
    """Rows of the embedding, the longest table outside the blocks."""
    tables = [m for m in model.modules() if isinstance(m, LINEAR + EMBEDDING)]
    outside = (m.weight.shape[0] for m in tables if not _within(m, model.layers))
    return max(outside, default=1)


def _within(module: nn.Module, outer: Sequence[nn.Module]) -> bool:
    return any(module is inner for one in outer for inner in one.modules())


def zeros(array: mx.array) -> mx.array:
    return mx.zeros(array.shape, array.dtype)


def made_up(array: mx.array) -> mx.array:
    """Random numbers in the array's shape and type that take no memory of their own."""
    strides = STRIDES[-array.ndim :] if array.ndim <= len(STRIDES) else None
    if strides is None:
        return zeros(array)
    needed = 1 + sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True))
    if mx.issubdtype(array.dtype, mx.floating):
        spread = 1.0 if array.ndim < 2 else array.shape[-1] ** -0.5
        pool = spread * mx.random.normal((needed,), key=mx.random.key(needed))
        pool = pool.astype(array.dtype)
    else:
        pool = mx.random.randint(0, 1 << 30, (needed,), key=mx.random.key(needed))
        pool = pool.astype(array.dtype)
    return mx.as_strided(pool, array.shape, strides)
