"""From a micro-batch to the log-probability of each of its targets: what all objectives stand on.

Training, validation and evaluation share this one forward pass. At the start it finds out
what the model allows: whether its head comes apart from it (train/head.py) and whether rows
can be packed (train/packing.py); a model that allows neither is run as it is.
"""

from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.data.batches import Batch
from mlxlora.train.attention import Spans
from mlxlora.train.head import find_head
from mlxlora.train.logprobs import logprobs_of, target_logprobs, target_logprobs_only
from mlxlora.train.packing import caches, can_pack, lean_attention
from mlxlora.train.recompute import recomputed_blocks

WHOLE_LOGITS = (
    "this model's head does not come apart from it (or is trained), so whole logits are computed, "
    "which takes more memory"
)
PADDED = (
    "the blocks of this model cannot work on packed rows, or not cheaply, so rows are padded in "
    "groups of like length"
)


class Forward:
    """Computes log-probabilities of targets with the model in its present state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.checkpoint_blocks = False  # compute blocks again in the backward pass
        was_training = model.training
        model.eval()  # dropout would differ from row to row
        self.head = find_head(model)
        self.packs = can_pack(model, self._outputs)
        self.vocabulary = int(model(mx.array([[1]])).shape[-1])
        model.train(was_training)
        missing = ((self.head is None, WHOLE_LOGITS), (not self.packs, PADDED))
        self.notes = tuple(note for absent, note in missing if absent)

    def __call__(
        self,
        inputs: mx.array,
        positions: mx.array,
        targets: mx.array,
        segments: mx.array | None = None,
        *,
        ends: tuple[int, ...],
        reach: int | None = None,
        gradient: bool = False,
    ) -> mx.array:
        """log p of the targets (S,) that follow these positions (S,) of inputs (B, T), float32.

        The other arguments are a Batch's. gradient: it will be differentiated.
        """
        spans = Spans(ends, segments=segments, reach=reach)
        checkpointed = self.checkpoint_blocks and gradient
        with recomputed_blocks(self.model) if checkpointed else nullcontext():
            outputs = self._outputs(inputs, caches(self.model, spans) if self.packs else None)
        at_targets = outputs.reshape(-1, outputs.shape[-1])[positions]
        if self.head is None:
            return logprobs_of(at_targets, targets)
        logprobs = target_logprobs if gradient else target_logprobs_only
        return logprobs(self.head, at_targets, targets)

    def _outputs(self, inputs: mx.array, cache: Any) -> mx.array:
        """Hidden states (B, T, H) before the head, or logits if it does not come apart."""
        with lean_attention(cache or ()):
            if self.head is not None:
                return self.head.hidden(inputs, cache)
            return self.model(inputs, cache=cache)


def arrays(batch: Batch) -> tuple[mx.array, ...]:
    """(inputs, positions, targets, weights[, segments]) on the device."""
    own = (batch.inputs, batch.positions, batch.targets, batch.weights, batch.segments)
    return tuple(mx.array(a) for a in own if a is not None)
