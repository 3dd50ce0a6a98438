"""Steps from mlx-lm's tensors to transformers', each a stream of (name, array) in and out.

A step keeps nothing that it has handed on, so a model goes through it layer by layer.
"""

import re
from collections.abc import Callable, Iterator

import mlx.core as mx

from mlxlora.errors import ExportError

Tensors = Iterator[tuple[str, mx.array]]  # (name, array)
Step = Callable[[Tensors], Tensors]


def renamed(pattern: str, name: str) -> Step:
    """Names that match begin otherwise; name is a template of re.sub."""

    def step(tensors: Tensors) -> Tensors:
        for path, array in tensors:
            yield re.sub(f"^{pattern}", name, path), array

    return step


def unstacked(pattern: str, name: str) -> Step:
    """(experts, ...) one by one. name: a template, with * for the number of the expert."""

    def step(tensors: Tensors) -> Tensors:
        for path, array in tensors:
            found = re.fullmatch(pattern, path)
            if found is None:
                yield path, array
                continue
            there = found.expand(name)
            for number in range(array.shape[0]):
                yield there.replace("*", str(number)), array[number]

    return step


def changed(pattern: str, change: Callable[[mx.array], mx.array]) -> Step:
    """Other numbers, or another shape, under the same name."""

    def step(tensors: Tensors) -> Tensors:
        for path, array in tensors:
            yield path, change(array) if re.fullmatch(pattern, path) else array

    return step


def joined(
    first: str, second: str, name: str, join: Callable[[mx.array, mx.array], mx.array]
) -> Step:
    """Two tensors of one module, by the ends of their names, as one; whichever comes first."""

    def step(tensors: Tensors) -> Tensors:
        waiting: dict[str, dict[str, mx.array]] = {}
        for path, array in tensors:
            end = next((e for e in (first, second) if path.endswith(f".{e}")), None)
            if end is None:
                yield path, array
                continue
            place = path.removesuffix(end)
            pair = waiting.setdefault(place, {})
            pair[end] = array
            if len(pair) == 2:
                del waiting[place]
                yield place + name, join(pair[first], pair[second])
        if waiting:
            raise ExportError(f"{next(iter(waiting))}* comes without its other half")

    return step


def latent(embed_q: mx.array, unembed_out: mx.array) -> mx.array:
    """(heads, rank, k), (heads, v, rank) -> (heads * (k + v), rank), the keys of a head first."""
    whole = mx.concatenate([embed_q.swapaxes(-1, -2), unembed_out], axis=1)
    return whole.reshape(-1, whole.shape[-1])


def gate_up(gate: mx.array, up: mx.array) -> mx.array:
    """(experts, n, in) twice -> (experts, 2 n, in)."""
    return mx.concatenate([gate, up], axis=1)


def channels_first(weight: mx.array) -> mx.array:
    """Of a depthwise convolution: (channels, width, 1) -> (channels, 1, width)."""
    return weight.swapaxes(1, 2)
