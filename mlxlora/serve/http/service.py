"""What requests are answered with: the engine, the names of its models, and who reads requests."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlxlora.serve.calls.reading import Calls
from mlxlora.serve.engine import Engine
from mlxlora.serve.http.reader import Reader
from mlxlora.serve.wire import prompts
from mlxlora.serve.wire.abilities import capabilities
from mlxlora.serve.wire.model import Defaults, Model
from mlxlora.serve.wire.refusals import WireError
from mlxlora.serve.wire.spelling import Spelling

T = TypeVar("T")


@dataclass
class Service:
    """What requests are answered with. name: the base's, in requests."""

    engine: Engine
    name: str
    defaults: Defaults = field(default_factory=Defaults)
    adapter_root: Path | None = None
    say: Callable[[str], None] = lambda line: None  # a line for whoever runs the server
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        tokenizer = self.engine.base.tokenizer
        self.model = Model(tokenizer, self.engine.room.context, self.engine.grammars, self.defaults)
        self.spelling = Spelling(tokenizer)
        self.calls = Calls(tokenizer)
        self.capabilities = capabilities(tokenizer)
        self.fingerprint = f"mlxlora-{self.engine.base.identity.fingerprint[:12]}"
        self._read, self._check = Reader(), Reader()

    async def read(self, what: Callable[[], T]) -> T:
        """Have what may take its time done beside the event loop."""
        return await self._read(what)

    async def check(self, made: prompts.Chat) -> None:
        """Whether its grammar can be followed. Only who brings a grammar waits for others'."""
        if made.holds:
            await self._check(lambda: prompts.check(made, self.model))

    def adapter(self, model: str) -> str | None:
        """The adapter that a request means. Raises WireError (404)."""
        if model == self.name:
            return None
        if model in self.engine.names:
            return model
        raise no_model(model)

    def models(self) -> list[dict[str, Any]]:
        base = {
            "object": "model",
            "created": self.created,
            "owned_by": "mlxlora",
            "root": self.name,
            "max_model_len": self.engine.room.context,
            "capabilities": self.capabilities,
        }
        adapters = sorted(self.engine.names.items())
        return [
            {"id": self.name, **base, "parent": None},
            *(
                {"id": name, **base, "created": int(served.since), "parent": self.name}
                for name, served in adapters
            ),
        ]


def no_model(name: str) -> WireError:
    return WireError(
        404,
        f"there is no model {name[:100]!r} here; GET /v1/models lists them",
        param="model",
        code="model_not_found",
    )
