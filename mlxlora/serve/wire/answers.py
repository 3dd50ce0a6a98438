"""What all answers have, as OpenAI writes them: a head, usage, numbers that JSON can hold."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from mlxlora.serve.orders import End

LEAST = -9999.0  # how OpenAI writes the log-probability of what cannot be
Json = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """What all parts of one answer begin with."""

    id: str
    model: str
    fingerprint: str
    created: int  # seconds since the epoch

    def part(self, object: str, choices: list[Json], usage: Json | None = None) -> Json:
        return {
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **({} if usage is None else {"usage": usage}),
        }


def head(kind: str, model: str, fingerprint: str) -> Head:
    """kind: "chatcmpl" or "cmpl". model: as the request named it."""
    return Head(f"{kind}-{token_hex(12)}", model, fingerprint, int(time.time()))


def usage(ends: Sequence[tuple[int, End]]) -> Json:
    """ends: of each choice the number of its prompt, and how it ended; a prompt counts once."""
    prompts: dict[int, End] = {}
    for prompt, end in ends:
        prompts.setdefault(prompt, end)
    asked = sum(end.prompt_tokens for end in prompts.values())
    completion = sum(end.tokens for _, end in ends)
    return {
        "prompt_tokens": asked,
        "completion_tokens": completion,
        "total_tokens": asked + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(end.cached_tokens for end in prompts.values())
        },
    }


def number(logprob: float) -> float:
    """A log-probability; JSON has no infinity."""
    return logprob if math.isfinite(logprob) else LEAST
