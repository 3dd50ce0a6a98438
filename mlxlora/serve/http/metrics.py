"""What Prometheus reads: counters and gauges of the engine, as text (exposition format 0.0.4)."""

import dataclasses
from collections.abc import Iterator, Mapping

import mlx.core as mx

from mlxlora.memory import footprint
from mlxlora.serve.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTED = {
    "answers": "answers that ended, cancelled ones included",
    "cancelled": "requests that were cancelled before their answer was complete",
    "failed": "requests that failed for a fault of the server",
    "refused": "requests refused because too many waited",
    "prompt_tokens": "tokens of prompts",
    "cached_tokens": "of these, taken from the prompt cache",
    "tokens": "tokens generated",
    "restarts": "times that the engine failed and began anew",
}


def metrics(engine: Engine, responses: Mapping[int, int]) -> str:
    """responses: how many were sent, by status code."""
    return "\n".join([*_lines(engine, responses), ""])


def _lines(engine: Engine, responses: Mapping[int, int]) -> Iterator[str]:
    for name, value in dataclasses.asdict(engine.vitals.counters).items():
        yield from _one(f"mlxlora_{name}_total", "counter", COUNTED[name], value)
    name = "mlxlora_http_responses_total"
    yield f"# HELP {name} HTTP responses by status code"
    yield f"# TYPE {name} counter"
    for code, count in sorted(responses.items()):
        yield f'{name}{{code="{code}"}} {count}'
    health = engine.health()
    entries, kept = engine.kept()
    gauges = {
        "mlxlora_up": ("1 if the engine is healthy", int(health["status"] == "ok")),
        "mlxlora_running": ("requests being answered", health["running"]),
        "mlxlora_waiting": ("requests that wait", health["waiting"]),
        "mlxlora_adapters": ("adapters in service", len(health["adapters"])),
        "mlxlora_prompt_cache_entries": ("prompts kept for the next one", entries),
        "mlxlora_prompt_cache_bytes": ("their keys and values", kept),
        "mlxlora_mlx_active_bytes": ("memory that MLX uses", mx.get_active_memory()),
        "mlxlora_mlx_cache_bytes": ("memory that MLX keeps for reuse", mx.get_cache_memory()),
        "process_resident_memory_bytes": ("memory of the whole process", footprint().now),
    }
    for name, (says, value) in gauges.items():
        yield from _one(name, "gauge", says, value)


def _one(name: str, kind: str, says: str, value: float) -> Iterator[str]:
    yield f"# HELP {name} {says}"
    yield f"# TYPE {name} {kind}"
    yield f"{name} {value}"
