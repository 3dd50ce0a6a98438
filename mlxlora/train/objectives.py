"""Losses as pairs: (sum of token losses, number of supervised tokens).

Micro-batches add the pairs and divide once, so accumulation and padding never change the
update. Every objective stands on the log-probability of each target token.
"""

import mlx.core as mx
import mlx.nn as nn


def target_logprobs(model: nn.Module, inputs: mx.array, targets: mx.array) -> mx.array:
    """log p(targets | inputs), (B, T) float32, for tokens (B, T)."""
    logits = model(inputs).astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    return chosen - mx.logsumexp(logits, axis=-1)


def sft(
    model: nn.Module, inputs: mx.array, targets: mx.array, mask: mx.array
) -> tuple[mx.array, mx.array]:
    """Supervised fine-tuning: negative log-likelihood of the tokens where mask is True."""
    losses = -target_logprobs(model, inputs, targets)
    # where, not a product: a padded position may be anything, infinity included.
    return mx.where(mask, losses, 0.0).sum(), mask.sum()
