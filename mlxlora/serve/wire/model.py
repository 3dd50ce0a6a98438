"""What requests are turned into orders for."""

from dataclasses import dataclass, field
from typing import Any

from mlxlora.serve.grammar.following import Grammars


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing.

    Temperature 0, not OpenAI's 1: what was tuned for a task is asked for its likeliest answer,
    twice the same. max_tokens is for chats; completions have OpenAI's 16, since text that is
    merely continued seldom ends by itself.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 4096
    completion_tokens: int = 16


@dataclass(frozen=True)
class Model:
    """What requests are turned into orders for. context: tokens of prompt and answer together."""

    tokenizer: Any
    context: int
    grammars: Grammars
    defaults: Defaults = field(default_factory=Defaults)

    @property
    def vocabulary(self) -> int:
        return int(self.tokenizer._vocabulary)
