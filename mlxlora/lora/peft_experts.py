"""Experts in PEFT's files, stacked as mlx-lm has them: one by one, or fused as parameters.

One by one is how transformers had them before version 5: a module for each expert and
projection. From version 5 on a block's experts are two parameters, gate_up_proj (experts, 2 x
inner, hidden) and down_proj (experts, hidden, inner), and PEFT adapts each through two matrices
for all experts (its ParamWrapper): lora_A (r x experts, in), rows of an expert together, and
lora_B (out, r x experts), columns of an expert apart. The file does not say which parameter a
pair is of; its shapes do. Before 0.19, PEFT took the stored order for (in, out), and A and B
stand the other way around.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxlora.lora.layers import weight_shape
from mlxlora.lora.names import DOWN, GATE, UP

FUSED = "gate_up_proj"
INTERLEAVED = {"gpt_oss"}  # families whose rows of gate and up alternate in the fused parameter
STRAIGHT_SINCE = (0, 19)  # PEFT's version


@dataclass(frozen=True)
class Fused:
    """A pair of matrices as the factors of one parameter, seen from its weight."""

    parameter: str  # gate_up_proj or down_proj
    left: mx.array  # (experts, out, r)
    right: mx.array  # (experts, r, in)

    def leaves(self, interleaved: bool) -> dict[str, tuple[mx.array, mx.array]]:
        """Projection -> (left, right): gate and up share A, and have half of B each."""
        if self.parameter == DOWN:
            return {DOWN: (self.left, self.right)}
        if interleaved:
            return {GATE: (self.left[:, ::2], self.right), UP: (self.left[:, 1::2], self.right)}
        gate, up = mx.split(self.left, 2, axis=1)
        return {GATE: (gate, self.right), UP: (up, self.right)}


def fused(a: mx.array, b: mx.array, block: Mapping[str, nn.Module], version: str) -> Fused | str:
    """What a pair lora_A, lora_B is of a block's experts, or what is wrong with it.

    block: the stacked gate_proj, up_proj and down_proj. version of PEFT that wrote it, or "".
    """
    count, inner, hidden = weight_shape(block[GATE])
    if (
        a.ndim != 2
        or b.ndim != 2
        or a.shape[0] != b.shape[1]
        or not a.shape[0]
        or a.shape[0] % count
    ):
        return f"lora_A {a.shape} and lora_B {b.shape} are no factors of {count} experts"
    inside, outside = a.shape[1], b.shape[0]
    wanted = {FUSED: (hidden, 2 * inner), DOWN: (inner, hidden)}
    straight = [p for p, sizes in wanted.items() if sizes == (inside, outside)]
    crossed = [p for p, sizes in wanted.items() if sizes == (outside, inside)]
    if straight and crossed:  # a square: the shapes fit either way
        if not version:
            return "its shapes fit both ways around, and peft_version does not say which is meant"
        straight, crossed = (straight, []) if _since(version) else ([], crossed)
    if not straight and not crossed:
        fits = " or ".join(f"{p} ({i} to {o})" for p, (i, o) in wanted.items())
        return f"it is from {inside} to {outside}, the base's experts are {fits}"
    rows = a.reshape(count, -1, inside)  # (experts, r, in)
    columns = b.reshape(outside, -1, count)  # (out, r, experts)
    if straight:
        return Fused(straight[0], columns.transpose(2, 0, 1), rows)
    return Fused(crossed[0], rows.swapaxes(1, 2), columns.transpose(2, 1, 0))


def _since(version: str) -> bool:
    numbers = re.findall(r"\d+", version)[:2]
    return tuple(map(int, numbers)) >= STRAIGHT_SINCE
