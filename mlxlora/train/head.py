"""Where a model ends and its head begins: found by trying, checked against the model's own words.

mlx-lm's models turn tokens into logits in one call. Training wants the hidden states before
the head, and only at supervised positions. The head is the last product outside the blocks;
a stand-in in its place catches what it is given. What comes after it (a scale, a soft-cap)
is found by letting the stand-in answer with known logits. No architecture is named here, and
whatever does not come apart this way keeps its own logits.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxlora.lora.layers import EMBEDDING, LINEAR, LowRank
from mlxlora.quantized import multiply

PROBE = 8  # tokens


@dataclass(frozen=True)
class Head:
    """A frozen head: logits = cap * tanh(scale * (h W' + b) / cap), or without the cap."""

    model: nn.Module
    path: str
    layer: nn.Module  # Linear or Embedding (tied weights), quantized or not
    scale: float = 1.0
    cap: float = 0.0  # 0: none

    @property
    def size(self) -> int:
        """The vocabulary: logits per token."""
        return int(self.layer.weight.shape[0])

    def hidden(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """What the head is given, (B, T, H), for tokens (B, T)."""
        given: list[mx.array] = []

        def catch(x: mx.array) -> mx.array:
            given.append(x)
            return x[..., :1]  # something small for whatever the model does with logits

        with _standing_in(self.model, {self.path: _StandIn(self.layer, catch)}):
            self.model(inputs, cache=cache)
        return given[-1]

    def finish(self, products: mx.array) -> mx.array:
        """Products with the head's weight and bias -> logits."""
        if self.scale != 1:
            products = products * self.scale
        return self.cap * mx.tanh(products / self.cap) if self.cap else products


def find_head(model: nn.Module) -> Head | None:
    """The model's frozen head, or None if it does not come apart exactly.

    None too if the head is trained, or is more than a product, a scale and a soft-cap.
    """
    tokens = mx.arange(1, 1 + PROBE)[None]
    try:
        found = _find(model, tokens)
        return found if found is not None and _agrees(found, tokens) else None
    except Exception:  # whatever an architecture raises, its own logits remain
        return None


def _find(model: nn.Module, tokens: mx.array) -> Head | None:
    used: list[str] = []
    logits = _answered(
        model, tokens, {path: _recorder(path, m, used) for path, m in _candidates(model)}
    )
    if not used:
        return None
    head = Head(model, used[-1], dict(model.named_modules())[used[-1]])
    if head.layer.trainable_parameters() or head.size != logits.shape[-1]:
        return None
    # What becomes of known logits: 1 shows a scale, a huge one a soft-cap.
    known = mx.linspace(-60, 60, logits.size).reshape(logits.shape)  # float32: scales are exact
    known[..., 0] = 1.0
    seen = _after(head, tokens, known)
    one = float(seen[0, 0, 0].item())  # type: ignore[arg-type]
    huge = mx.full(logits.shape, 1e6)
    cap = float(_after(head, tokens, huge).max().item())  # type: ignore[arg-type]
    scaled = replace(head, scale=one)
    capped = replace(head, cap=cap)
    # Where both are at work, 1 has become cap * tanh(scale / cap).
    both = replace(head, scale=cap * math.atanh(one / cap), cap=cap) if abs(one) < cap else head
    for candidate in (head, scaled, capped, both):
        if mx.allclose(seen, candidate.finish(known), rtol=1e-5, atol=1e-5):
            return candidate
    return None


def _after(head: Head, tokens: mx.array, products: mx.array) -> mx.array:
    """The logits the model makes of these products with its head, float32."""
    stand_in = _StandIn(head.layer, lambda _: products)
    return _answered(head.model, tokens, {head.path: stand_in}).astype(mx.float32)


def _answered(model: nn.Module, tokens: mx.array, stand_ins: dict[str, nn.Module]) -> mx.array:
    with _standing_in(model, stand_ins):
        return model(tokens)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What a head can be: outside the blocks, and no frozen part of a layer that is trained."""
    around = [*model.layers, *(m for m in model.modules() if isinstance(m, LowRank))]
    inside = {id(m) for outer in around for m in outer.modules()}
    for path, module in model.named_modules():
        if path and id(module) not in inside and isinstance(module, LINEAR + EMBEDDING):
            yield path, module


def _agrees(head: Head, tokens: mx.array) -> bool:
    """Whether hidden states and head give the model's own logits."""
    own = head.model(tokens)
    products = multiply(head.layer, head.hidden(tokens))
    if "bias" in head.layer:
        products = products + head.layer.bias
    ours = head.finish(products.astype(mx.float32))
    coarse = head.layer.get("scales", head.layer.weight).dtype != mx.float32
    return difference(ours, own) <= (2e-2 if coarse else 1e-4)


def difference(ours: mx.array, own: mx.array) -> float:
    """The largest difference, relative to the largest value."""
    ours, own = ours.astype(mx.float32), own.astype(mx.float32)
    worst = mx.abs(ours - own).max() / mx.maximum(mx.abs(own).max(), 1e-6)
    return float(worst.item())  # type: ignore[arg-type]


class _StandIn(nn.Module):
    """In the head's place: answers a product with it by respond(x); embeds as the layer does."""

    def __init__(self, layer: nn.Module, respond: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self._layer, self._respond = layer, respond

    @property
    def weight(self) -> mx.array:
        return self._layer.weight

    def __call__(self, x: mx.array) -> mx.array:
        return self._layer(x) if isinstance(self._layer, EMBEDDING) else self._respond(x)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._respond(x)


def _recorder(path: str, layer: nn.Module, used: list[str]) -> _StandIn:
    def respond(x: mx.array) -> mx.array:
        used.append(path)
        return layer.as_linear(x) if isinstance(layer, EMBEDDING) else layer(x)

    return _StandIn(layer, respond)


@contextmanager
def _standing_in(model: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Iterator[None]:
    """These modules in the place of the model's own inside, its own again after."""
    modules = dict(model.named_modules())
    own = {path: modules[path] for path in stand_ins}
    model.update_modules(tree_unflatten(list(stand_ins.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(own.items())))
