"""How much is served at once, in bytes: keys and values, and those that are kept for later."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, make_prompt_cache

from mlxlora.base import Base
from mlxlora.errors import ModelError
from mlxlora.memory import memory_budget

LEAST_KEYS = 256 << 20  # bytes for keys and values, however little memory there seems to be
MOST_PREFIXES = 2 << 30  # bytes of prompts that are kept, unless told otherwise
PREFIX_SHARE = 1 / 8  # of the memory beside the weights
LONGEST = 1 << 17  # tokens of a context that no config limits


@dataclass(frozen=True)
class Room:
    """What one model may hold of this machine's memory."""

    weights: int  # bytes
    keys: int  # bytes, of the keys and values of what is being answered
    prefixes: int  # bytes, of those that are kept
    tokens: int  # whose keys and values fit
    context: int  # tokens of one prompt and its answer, at most

    @property
    def needed(self) -> int:
        return self.weights + self.keys + self.prefixes


def room_for(base: Base, prefixes: int | None, context: int | None) -> Room:
    """prefixes, bytes, and context, tokens, as the user says; None: what suits this machine.

    Raises ModelError for a model whose caches cannot be batched.
    """
    weights = sum(array.nbytes for _, array in tree_flatten(base.model.parameters()))
    beside = max(memory_budget() - weights, LEAST_KEYS)
    if prefixes is None:
        prefixes = min(MOST_PREFIXES, int(PREFIX_SHARE * beside))
    keys = max(beside - prefixes, LEAST_KEYS)
    tokens = keys // max(1, _bytes_per_token(base))
    return Room(weights, keys, prefixes, tokens, min(_longest(base), tokens, context or LONGEST))


def _longest(base: Base) -> int:
    """Tokens that the model was made for, by its config."""
    config = base.config.get("text_config") or base.config
    longest = config.get("max_position_embeddings")
    return longest if isinstance(longest, int) and longest > 0 else LONGEST


def _bytes_per_token(base: Base) -> int:
    """Of keys and values; measured, since families differ. Raises ModelError if not batchable."""
    caches = make_prompt_cache(base.model)
    unable = next((type(c).__name__ for c in caches if not hasattr(c, "merge")), None)
    if unable is not None:
        raise ModelError(
            f"{base.path}: mlx-lm cannot decode several requests of this model together "
            f"({unable}), so it cannot be served"
        )
    base.model(mx.zeros((1, 1), mx.int32), cache=caches)
    mx.eval([cache.state for cache in caches])
    return sum(map(_growth, caches))


def _growth(cache: Any) -> int:
    """Bytes that one more token takes. The state of a recurrent block does not grow."""
    if isinstance(cache, CacheList):
        return sum(map(_growth, cache.caches))
    return -(-int(cache.nbytes) // cache.step) if hasattr(cache, "step") else 0
