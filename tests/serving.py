"""Adapters for a base, and an engine's answers collected: what the tests of serving share."""

from queue import Queue

import mlx.core as mx
from conftest import randomized

from mlxlora.base import Base
from mlxlora.config import LoraConfig
from mlxlora.lora.adapter import Adapter
from mlxlora.lora.attach import detach, low_rank_layers
from mlxlora.lora.fresh import new_layers
from mlxlora.serve.engine import Engine
from mlxlora.serve.orders import Event, Order, Piece, Sampling

SECONDS = 60  # to wait for an event, at most


def adapter_for(base: Base, seed: int, rank: int = 4, **config) -> Adapter:
    """An adapter that does something, as training would leave it."""
    new_layers(base.model, LoraConfig(rank=rank, alpha=2.0 * rank, **config), seed=seed)
    randomized(base.model, seed)
    weights = {}
    for path, layer in low_rank_layers(base.model):
        for name in ("lora_a", "lora_b", "m"):
            if name in layer:
                weights[f"{path}.{name}"] = layer[name]
    mx.eval(weights)
    detach(base.model)
    method = "dora" if config.get("method") == "dora" else "lora"
    return Adapter(method, weights, rank, 2.0)


class Told:
    """A sink that remembers; events can be waited for."""

    def __init__(self) -> None:
        self._queue: Queue[Event] = Queue()
        self.pieces: list[Piece] = []
        self.last: Event | None = None

    def __call__(self, event: Event) -> None:
        self._queue.put(event)

    def next(self) -> Event:
        event = self._queue.get(timeout=SECONDS)
        if isinstance(event, Piece):
            self.pieces.append(event)
        else:
            self.last = event
        return event

    def wait(self) -> Event:
        """The End or Fault."""
        while self.last is None:
            self.next()
        return self.last

    @property
    def tokens(self) -> list[int]:
        self.wait()
        return [spelled.token for piece in self.pieces for spelled in piece.tokens]

    @property
    def text(self) -> str:
        self.wait()
        return "".join(piece.text for piece in self.pieces)


def ask(engine: Engine, prompt: list[int], adapter: str | None = None, **order) -> Told:
    """Submit an order whose tokens are told."""
    told = Told()
    order = {"max_tokens": 16, "top": 0, "sampling": Sampling(), **order}
    engine.submit(Order(tuple(prompt), adapter, **order), told)
    return told
