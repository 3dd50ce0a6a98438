"""Bytes before they are spent, roughly: enough to see that a machine obviously suffices.

What is closer is measured (train/probe.py). Activations are estimated from the sizes of the
layers' outputs: a block keeps, per token, about twice what its linear layers and eight vectors of
the model's width take (measured on dense decoders; a test holds the estimate to that). Attention
by tiles and log-probabilities by blocks keep next to nothing; whole logits, where a model needs
them, are kept several times.
"""

from dataclasses import dataclass

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxlora.lora.layers import EXPERTS, LINEAR, weight_shape
from mlxlora.machine import block_bytes
from mlxlora.quantized import activation_dtype

KEPT = 2.0  # of the outputs' sizes, per token and block
VECTORS = 8  # of the model's width: norms, residuals, what attention rearranges
EXPERTS_PER_TOKEN = 8  # as most mixtures choose
OPTIMIZER_COPIES = 4  # gradients, their sum, and two moments of every trained weight
LOGIT_COPIES = 3.5  # of whole logits in float32, while they are differentiated
BLOCKS_ALIVE = 6  # temporary arrays of block_bytes() at once


@dataclass(frozen=True)
class Held:
    """Bytes that are held from the first update to the last."""

    base: int
    adapter: int  # what is trained, its gradients and the optimizer's state

    @property
    def bytes(self) -> int:
        return self.base + self.adapter


@dataclass(frozen=True)
class RoughPlan:
    """About how many bytes a training step will hold."""

    weights: int  # base, adapter, gradients and optimizer state
    per_token: int  # activations kept for the backward pass, all blocks
    per_token_checkpointed: int  # the same when blocks are computed again
    working: int  # temporary arrays

    def peak(self, tokens: int, checkpoint_blocks: bool) -> int:
        """About the peak for micro-batches of so many tokens."""
        each = self.per_token_checkpointed if checkpoint_blocks else self.per_token
        return self.weights + self.working + each * tokens


def plan_memory(model: nn.Module, blocks: list[nn.Module], logits: int = 0) -> RoughPlan:
    """A rough plan for a model of which these blocks are differentiated.

    logits: how many a token has, if they are computed whole.
    """
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    trained = sum(array.nbytes for _, array in tree_flatten(model.trainable_parameters()))
    kept, inputs = [0], [0]
    for block in blocks:
        width, size = _width(block), activation_dtype(block).size
        kept.append(int(KEPT * size * (_outputs(block) + VECTORS * width)))
        inputs.append(size * width)
    of_logits = int(4 * LOGIT_COPIES * logits)
    return RoughPlan(
        weights=held + OPTIMIZER_COPIES * trained,
        per_token=sum(kept) + of_logits,
        # The block at hand is there twice: its forward pass again, and its gradients.
        per_token_checkpointed=2 * max(kept) + sum(inputs) + of_logits,
        working=BLOCKS_ALIVE * block_bytes(),
    )


def _outputs(block: nn.Module) -> int:
    """Numbers that the block's linear layers put out per token."""
    total = 0
    for module in block.modules():
        if isinstance(module, LINEAR):
            total += module.weight.shape[0]
        elif isinstance(module, EXPERTS):
            total += min(EXPERTS_PER_TOKEN, module.weight.shape[0]) * module.weight.shape[1]
    return total


def _width(block: nn.Module) -> int:
    """The model's width: the input size that most linear layers of the block share."""
    sizes = [weight_shape(m)[-1] for m in block.modules() if isinstance(m, LINEAR)]
    return max(set(sizes), key=lambda size: (sizes.count(size), size), default=0)
