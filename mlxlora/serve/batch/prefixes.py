"""Keys and values of prompts that were computed already, for the next one that begins alike.

They depend on the adapter, so they are kept by its content. Kept are at most so many bytes; the
longest unused goes first. A cache that cannot be cut back (recurrent blocks, full windows) is of
use only to a prompt that goes on where it ends.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    can_trim_prompt_cache,
    trim_prompt_cache,
)

WORTHWHILE = 16  # tokens; fewer are computed sooner than merged


@dataclass(frozen=True)
class _Kept:
    key: str
    tokens: np.ndarray  # (T,) int32, what the caches hold
    caches: list[Any]  # one for each block
    size: int  # bytes


class Prefixes:
    """At most limit bytes of caches, by key."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # the longest unused first
        self._number = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: str, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """(caches to go on with, how many of the tokens they hold); (None, 0) if there are none.

        At least the last token is left to compute. The caches may be written to.
        """
        wanted = np.asarray(tokens, np.int32)
        best, length = -1, WORTHWHILE - 1
        for number, kept in self._kept.items():
            if kept.key != key:
                continue
            shared = _shared(kept.tokens, wanted[:-1])
            if shared < len(kept.tokens) and not can_trim_prompt_cache(kept.caches):
                continue
            if shared > length:
                best, length = number, shared
        if best < 0:
            return None, 0
        self._kept.move_to_end(best)
        kept = self._kept[best]
        caches = [_twin(cache) for cache in kept.caches]
        if length < len(kept.tokens):
            trim_prompt_cache(caches, len(kept.tokens) - length)
        return caches, length

    def keep(self, key: str, tokens: Sequence[int], caches: list[Any]) -> None:
        """Keep what caches hold of these tokens, in the place of any beginning of them."""
        if self.limit <= 0 or len(tokens) < WORTHWHILE:
            return
        for cache in caches:
            _cut_loose(cache)
        mx.eval([cache.state for cache in caches])  # or the batch it was cut from would live on
        size = sum(cache.nbytes for cache in caches)
        if size > self.limit:
            return
        held = np.asarray(tokens, np.int32)
        for number, kept in list(self._kept.items()):
            covered = kept.key == key and _shared(kept.tokens, held) == len(kept.tokens)
            if covered and (len(kept.tokens) == len(held) or can_trim_prompt_cache(caches)):
                self._drop(number)
        self._number += 1
        self._kept[self._number] = _Kept(key, held, caches, size)
        self.size += size
        while self.size > self.limit:
            self._drop(next(iter(self._kept)))

    def forget(self, key: str | None = None) -> None:
        """Let go of what is kept by this key, or of everything."""
        for number, kept in list(self._kept.items()):
            if key is None or kept.key == key:
                self._drop(number)

    def _drop(self, number: int) -> None:
        self.size -= self._kept.pop(number).size


def _cut_loose(cache: Any) -> None:
    """A recurrent state is cut out of its batch as a view, which would keep the whole of it."""
    if isinstance(cache, CacheList):
        for part in cache.caches:
            _cut_loose(part)
    elif isinstance(cache, ArraysCache):
        cache.filter(mx.array([0]))  # gathers, so copies


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


def _twin(cache: Any) -> Any:
    """A cache of its own, with arrays of its own that share their memory until written to."""
    if isinstance(cache, mx.array):
        return cache[...]
    if isinstance(cache, list | tuple):
        return type(cache)(_twin(part) for part in cache)
    if not hasattr(cache, "state"):
        return cache
    twin = copy.copy(cache)
    for name, value in vars(cache).items():
        setattr(twin, name, _twin(value))
    return twin
