"""Every option once: its default, unit, help and limits.

A recipe is data: a TOML file whose tables are the dataclasses below (schema.py reads it).
This file opens no models and no data.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from mlxlora.schema import build, option, plain, read, to_toml


def _positive(value: Any) -> bool:
    return bool(value > 0)


def _not_negative(value: Any) -> bool:
    return bool(value >= 0)


def _fraction(value: Any) -> bool:
    return bool(0 <= value < 1)


def _rank(value: Any) -> bool:
    return 1 <= value <= MAX_RANK


def _all_positive(table: Any) -> bool:
    return all(value > 0 for value in table.values())


VALIDATIONS = 10  # a run, when eval.every is 0
MAX_RANK = 1 << 16  # above any model's width
# Our names of a row's keys (data/formats.py reads them).
COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output"),
    *("text", "system", "tools"),
)


@dataclass(frozen=True)
class DataConfig:
    path: str = option("", "JSONL file (split automatically) or directory with train.jsonl")
    max_length: int = option(
        2048, "longer rows are cut", "tokens", lambda n: n >= 2, "at least 2", flag=True
    )
    mask: Literal["assistant", "completion", "all"] = option(
        "assistant",
        "tokens trained: all assistant turns, the last one only, or every token",
        flag=True,
    )
    columns: dict[str, str] = option(
        {},
        "other names of the row's keys, e.g. {prompt = 'question', completion = 'answer'}",
        check=lambda table: all(name in COLUMNS for name in table),
        says=f"a table whose names are among {', '.join(COLUMNS)}",
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "stop at a row that cannot be used, or skip and count it", flag=True
    )
    valid_fraction: float = option(
        0.1,
        "share of a single file kept for validation (at most 1,000 rows)",
        check=lambda x: 0 <= x <= 0.5,
        says="between 0 and 0.5",
    )


@dataclass(frozen=True)
class LoraConfig:
    method: Literal["lora", "rslora", "dora", "pissa", "olora", "lora-fa", "full"] = option(
        "lora",
        "low-rank adapter: plain, scaled by alpha / sqrt(rank), with magnitudes, from the weights' "
        "own strongest (or first) directions, or with A frozen; or every weight",
        flag=True,
    )
    rank: int = option(
        16, "rank r of the update", "", _rank, "at least 1 and at most 65,536", flag=True
    )
    alpha: float = option(
        32.0,
        "the update is scaled by alpha / rank (rslora: alpha / sqrt(rank))",
        "",
        _positive,
        "above 0",
        flag=True,
    )
    dropout: float = option(
        0.0, "dropout on the adapter's input", "", _fraction, "at least 0 and below 1", flag=True
    )
    targets: tuple[str, ...] = option(
        ("all-linear",),
        "modules to adapt: 'all-linear', names (q_proj) or patterns (*.self_attn.*)",
        check=lambda names: len(names) > 0,
        says="at least one name",
    )
    train_also: tuple[str, ...] = option(
        (), "modules trained whole beside them, e.g. for new tokens: embed_tokens, lm_head, *norm*"
    )
    blocks: int | tuple[int, ...] = option(
        0, "0: all blocks; n: the last n; or a list of block numbers"
    )
    rank_pattern: dict[str, int] = option(
        {},
        "rank of modules that match a pattern",
        check=lambda table: all(map(_rank, table.values())),
        says="a table of ranks of at least 1 and at most 65,536",
    )
    alpha_pattern: dict[str, float] = option(
        {},
        "alpha of modules that match a pattern",
        check=_all_positive,
        says="a table of numbers above 0",
    )


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = option(2.0, "passes over the data", "", _positive, "above 0", flag=True)
    updates: int = option(
        0,
        "exact length of the run, instead of epochs",
        "optimizer updates",
        _not_negative,
        "0 or more",
        flag=True,
    )
    batch_size: int = option(
        8, "size of an optimizer update", "examples", _positive, "at least 1", flag=True
    )
    learning_rate: float = option(
        0.0,
        "peak learning rate (0: 2e-4, or 1e-4 from 14B parameters; full: 2e-5)",
        "",
        _not_negative,
        "0 or more",
        flag=True,
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "how the rate falls after warmup: cosine to 10 %, linear to 0, or not at all"
    )
    warmup: float = option(
        0.03,
        "below 1: share of all updates; from 1: number of updates",
        "optimizer updates",
        _not_negative,
        "0 or more",
    )
    optimizer: Literal["adamw", "adam", "lion", "adafactor", "sgd", "muon"] = option(
        "adamw", "optimizer", flag=True
    )
    lora_plus_ratio: float = option(
        1.0,
        "learning rate of B as a multiple of the others' (LoRA+: 16; 1: the same)",
        "",
        _positive,
        "above 0",
    )
    weight_decay: float = option(0.0, "decoupled weight decay", "", _not_negative, "0 or more")
    clip: float = option(
        1.0, "largest global gradient norm (0: no clipping)", "", _not_negative, "0 or more"
    )
    seed: int = option(
        0,
        "seed of order, initialisation and dropout",
        "",
        _not_negative,
        "0 or more",
        flag=True,
    )
    tokens_per_microbatch: int | Literal["auto"] = option(
        "auto",
        "an update is cut into pieces of at most this many tokens; the result is the same, but for "
        "what dropout draws",
        "tokens",
        lambda n: n == "auto" or n >= 1,
        "'auto' or at least 1",
    )
    packing: bool | Literal["auto"] = option(
        "auto", "put rows one after another instead of padding them; the result is the same"
    )
    checkpoint_blocks: bool | Literal["auto"] = option(
        "auto",
        "keep only the blocks' inputs and compute the blocks again: less memory, more time; "
        "auto: when a row would not fit otherwise",
    )

    def length(self, rows: int) -> int:
        """The run's updates in all over so many training rows."""
        return self.updates or math.ceil(self.epochs * -(-rows // self.batch_size))


@dataclass(frozen=True)
class EvalConfig:
    every: int = option(
        0,
        "validate every so many updates (0: about ten times a run)",
        "optimizer updates",
        _not_negative,
        "0 or more",
    )
    patience: int = option(
        0,
        "stop after so many validations without a better one (0: never)",
        "validations",
        _not_negative,
        "0 or more",
    )
    prompts: tuple[str, ...] = option((), "prompts answered before training and at each validation")
    max_tokens: int = option(64, "length of those answers", "tokens", _positive, "at least 1")

    def interval(self, updates: int) -> int:
        """From one validation to the next in a run of so many updates [optimizer updates]."""
        return self.every or max(1, round(updates / VALIDATIONS))


@dataclass(frozen=True)
class SaveConfig:
    every: int = option(
        0,
        "save a checkpoint every so many updates (0: about once a minute, less often if it is "
        "large); with each new best there is one too",
        "optimizer updates",
        _not_negative,
        "0 or more",
    )
    keep: int = option(
        2, "checkpoints kept, besides the best", "checkpoints", _positive, "at least 1"
    )


@dataclass(frozen=True)
class RunConfig:
    """A whole run. RunConfig.load reads a recipe and overrides; RunConfig.from_dict a dict."""

    model: str = option("", "local directory or Hub id of the base model")
    out: str = option("", "directory of the run; must not exist yet")
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)

    @classmethod
    def load(cls, recipe: str | Path | None = None, overrides: Iterable[str] = ()) -> "RunConfig":
        """Read a TOML recipe (or none) and apply "key=value" overrides.

        Raises ConfigError with every fault: unreadable TOML, unknown keys, wrong types.
        """
        return cls.from_dict(read(recipe, overrides))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "RunConfig":
        """Build from nested dicts. Raises ConfigError listing every fault."""
        return cast(RunConfig, build(cls, tree))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, tuples as lists: the inverse of from_dict."""
        return cast(dict[str, Any], plain(dataclasses.asdict(self)))

    def to_toml(self) -> str:
        """The resolved config as TOML that RunConfig.load reads back to an equal value."""
        return to_toml(self.to_dict())
