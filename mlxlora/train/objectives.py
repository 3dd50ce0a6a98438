"""Losses as sums over tokens, from the log-probability of each target.

Micro-batches add the sums and the numbers of supervised tokens, and divide once, so
accumulation, padding and packing never change the update.
"""

import mlx.core as mx


def sft(logprobs: mx.array, weights: mx.array) -> mx.array:
    """Supervised fine-tuning: the negative log-likelihood where weights (S,) is not 0, summed."""
    # where, not a product alone: a slot that is left over may be anything, infinity included.
    return mx.where(weights != 0, -logprobs * weights, 0.0).sum()
