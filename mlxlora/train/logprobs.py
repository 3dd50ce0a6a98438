"""log p(target) at supervised positions, without whole logits.

With a frozen head the gradient of a target's log-probability with respect to the hidden
state can be had in the pass that computes it:

    z = finish(h W' + b),  logp = z[t] - log sum_v exp z[v]
    d logp / d h = d[t] W[t] - sum_v softmax(z)[v] d[v] W[v],  d = dz / d(h W')

The vocabulary is walked in blocks with a running maximum (the online softmax of Milakov and
Gimelshein 2018, arXiv:1805.02867), so one block of logits exists at a time, and the vjp only
scales a stored (n, H) array. Two products with the head in all, none recomputed.
"""

import mlx.core as mx
import mlx.nn as nn

from mlxlora.lora.layers import weight_shape
from mlxlora.machine import block_bytes, exp
from mlxlora.quantized import multiply, multiply_back, output_rows, taken_rows, widens
from mlxlora.train.head import Head

BLOCK_STEP = 64  # blocks are a multiple of this many tokens of the vocabulary
WIDE_BLOCKS = 4  # of block_bytes() that a widened part of the head's weight may take


def target_logprobs(head: Head, hidden: mx.array, targets: mx.array) -> mx.array:
    """log p(targets), (n,) float32, for hidden states (n, H); differentiable in hidden."""

    @mx.custom_function
    def both(hidden: mx.array) -> tuple[mx.array, mx.array]:
        return _walk(head, hidden, targets, with_gradient=True)

    @both.vjp
    def both_vjp(hidden: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        return (cotangents[0][:, None] * outputs[1]).astype(hidden.dtype)

    outputs: list[mx.array] = both(hidden)  # type: ignore[assignment]
    return outputs[0]


def target_logprobs_only(head: Head, hidden: mx.array, targets: mx.array) -> mx.array:
    """The same without a gradient, for half the work."""
    return _walk(head, hidden, targets, with_gradient=False)[0]


def logprobs_of(logits: mx.array, targets: mx.array) -> mx.array:
    """log p(targets), (n,) float32, from whole logits (n, V)."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    return chosen - mx.logsumexp(logits, axis=-1)


def _walk(
    head: Head, hidden: mx.array, targets: mx.array, with_gradient: bool
) -> tuple[mx.array, mx.array]:
    """(logp (n,), d logp / d hidden (n, H)), both float32."""
    count = hidden.shape[0]
    top = mx.full((count, 1), -mx.inf)  # of the logits so far
    total = mx.zeros((count, 1))  # of exp(logits - top)
    pulled = mx.zeros(hidden.shape)  # sum of exp(logits - top) d W
    chosen = mx.zeros((count, 1))
    size = block_size(head, count)
    for start in range(0, head.size, size):
        part = output_rows(head.layer, start, min(head.size, start + size))
        # The next block waits for this one, so that one exists at a time; so does its weight,
        # which may have to be widened.
        waiting = hidden
        if start:
            waiting, part.weight = mx.depends([hidden, part.weight], [total, pulled, chosen])
        logits = _logits(head, part, waiting)
        place = mx.clip(targets[:, None] - start, 0, logits.shape[1] - 1)
        here = (targets[:, None] >= start) & (targets[:, None] < start + size)
        chosen = mx.where(here, mx.take_along_axis(logits, place, axis=1), chosen)
        highest = mx.maximum(top, logits.max(axis=1, keepdims=True))
        fade = exp(top - highest)
        weights = exp(logits - highest)
        total = total * fade + weights.sum(axis=1, keepdims=True)
        if with_gradient:
            weights = _times_slope(head, weights, logits).astype(hidden.dtype)
            pulled = pulled * fade + multiply_back(part, weights)
        top = highest
    logp = chosen - top - mx.log(total)
    if not with_gradient:
        return logp.squeeze(1), pulled
    own = _times_slope(head, taken_rows(head.layer, targets), chosen)
    return logp.squeeze(1), own - pulled / total


def _logits(head: Head, part: nn.Module, hidden: mx.array) -> mx.array:
    products = multiply(part, hidden)
    if "bias" in part:
        products = products + part.bias
    return head.finish(products.astype(mx.float32))


def _times_slope(head: Head, values: mx.array, logits: mx.array) -> mx.array:
    """values times d logits / d products, at these logits."""
    if head.cap:
        values = values * (1 - (logits / head.cap).square())
    return values * head.scale if head.scale != 1 else values


def block_size(head: Head, count: int) -> int:
    """Words of the vocabulary that are walked at once for so many hidden states.

    As many as block_bytes() holds logits of; where the head's weight has to be widened, no more
    than a few times block_bytes() hold of that, or few states would mean a wide copy of it all.
    """
    size = block_bytes() // (4 * max(1, count))
    if widens(head.layer):
        size = min(size, WIDE_BLOCKS * block_bytes() // (4 * weight_shape(head.layer)[-1]))
    return min(head.size, max(BLOCK_STEP, size // BLOCK_STEP * BLOCK_STEP))
