"""What a run says of itself: frozen dataclasses, one kind an event, and their JSON.

train() yields these; the console, log.jsonl and tests read them. Losses are means over
supervised tokens, in nats.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, cast, get_args


@dataclass(frozen=True)
class Start:
    """What is about to be trained."""

    updates: int
    rows: int
    valid_rows: int
    skipped_rows: int  # bad rows left out, with data.on_bad_row = "skip"
    trainable: int  # parameters
    parameters: int  # of the whole model
    validates_every: int  # updates
    adapted: int  # modules
    learning_rate: float
    shapes: tuple[tuple[int, int, int], ...]  # (rows, tokens, slots) of micro-batches; (): exact
    device: str
    products: str  # how quantized weights are multiplied: "packed", "widened"; "": there are none
    packed: bool  # rows one after another, not padded
    checkpoint_blocks: bool  # blocks are computed again in the backward pass
    tokens_per_microbatch: int
    notes: tuple[str, ...]  # what is worth saying of the data's rendering and of the model
    memory_limit: int = 0  # bytes that training may hold; 0: not told
    saves_every: int = 0  # updates; 0: by time
    saves_in: float = 0.0  # seconds until the first checkpoint, by time


@dataclass(frozen=True)
class Resumed:
    """The run goes on after this update; what the log said of later ones is gone from it."""

    update: int
    path: str  # of the checkpoint, "" if there was none and the run begins again
    notes: tuple[str, ...]  # damaged checkpoints that were passed over, other versions


@dataclass(frozen=True)
class Step:
    """One optimizer update."""

    update: int
    epoch: float
    loss: float
    tokens: int  # supervised
    learning_rate: float
    grad_norm: float  # before clipping
    seconds: float
    peak_memory: int  # bytes, MLX's own count


@dataclass(frozen=True)
class Skipped:
    """The update was computed, but is no number: weights and optimizer stayed as they were."""

    update: int
    reason: str
    rows: tuple[str, ...]  # file:line of the update's rows


@dataclass(frozen=True)
class Eval:
    """A pass over the validation rows."""

    update: int  # 0: before training
    loss: float
    perplexity: float
    tokens: int
    best: bool
    seconds: float


@dataclass(frozen=True)
class Saved:
    update: int
    path: str
    why: str  # "checkpoint", "best", "last" or "interrupted"
    seconds: float  # that saving took
    next_in: float = 0.0  # seconds until the next checkpoint, by time


@dataclass(frozen=True)
class Sample:
    """An answer to one of eval.prompts."""

    update: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Done:
    update: int
    reason: str  # "finished", "early stop" or "interrupted"
    adapter: str  # the weights to use
    last: str  # the last weights saved, elsewhere if they are not the best
    best_update: int
    valid_loss_before: float | None
    valid_loss: float | None  # of the adapter kept
    seconds: float
    dropped_rows: int  # per epoch, nothing left to train
    truncated_rows: int  # per epoch
    peak_memory: int  # bytes, MLX's own count, of the process that finished the run
    footprint: int  # bytes of that process at most, as the system counts; 0: it does not tell


Event = Start | Resumed | Step | Skipped | Eval | Saved | Sample | Done


def perplexity(loss: float) -> float:
    """exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def to_json(event: Event) -> str:
    """One line of log.jsonl: {"event": "step", "update": 12, "loss": ...}."""
    fields = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(event).items()  # JSON knows no NaN
    }
    named: dict[str, Any] = {"event": type(event).__name__.lower()}
    return json.dumps({**named, **fields}, ensure_ascii=False, allow_nan=False)


def from_json(line: bytes | str) -> Event:
    """The event of a line of log.jsonl. Raises ValueError if it is none."""
    fields = json.loads(line)
    kinds = {kind.__name__.lower(): kind for kind in get_args(Event)}
    try:
        kind = kinds[fields.pop("event")]
        floats = {f.name for f in dataclasses.fields(kind) if f.type is float}
        values = {
            k: math.nan if v is None and k in floats else _tuples(v) for k, v in fields.items()
        }
        return cast(Event, kind(**values))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event: {line!r}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
