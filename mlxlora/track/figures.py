"""What trackers are told of an event: figures by name, texts, the options.

Names are grouped as trackers like to draw them: train/loss, valid/loss. Steps are updates.
"""

import math
from typing import Any

from mlxlora.config import RunConfig
from mlxlora.schema import by_key
from mlxlora.train.events import Done, Eval, Event, Step


def figures(event: Event) -> dict[str, float]:
    """Finite figures of an event: nats, tokens per second, bytes."""
    told: dict[str, float | None] = {}
    if isinstance(event, Step):
        told = {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/gradient_norm": event.grad_norm,
            "train/epoch": event.epoch,
            "speed/tokens_per_second": event.tokens / max(event.seconds, 1e-9),
            "memory/peak_bytes": float(event.peak_memory),
        }
    elif isinstance(event, Eval):
        told = {"valid/loss": event.loss, "valid/perplexity": event.perplexity}
    elif isinstance(event, Done):
        told = {
            "best/valid_loss": event.valid_loss,
            "best/update": float(event.best_update),
            "seconds": event.seconds,
        }
    return {k: v for k, v in told.items() if v is not None and math.isfinite(v)}


def settings(run: RunConfig) -> dict[str, Any]:
    """Every option of the run by its whole name: lora.rank, train.learning_rate."""
    return by_key(run.to_dict())
