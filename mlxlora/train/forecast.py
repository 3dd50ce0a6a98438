"""What a run will need, foretold without loading its weights: bytes, seconds, and what to change.

The model is a skeleton (skeleton.py), the rows' lengths are sampled with its tokenizer, and a few
blocks of made-up weights are probed (train/probe.py). Seconds are an estimate of this machine.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxlora.config import LoraConfig, RunConfig
from mlxlora.data.batches import Size, sample_sizes
from mlxlora.data.records import open_splits
from mlxlora.data.render import Renderer
from mlxlora.errors import ConfigError
from mlxlora.lora.fresh import prepare
from mlxlora.machine import on_cpu
from mlxlora.memory import cache_limit, memory_budget, offered_memory
from mlxlora.quantized import KEPT_BYTES, QUANTIZED
from mlxlora.skeleton import Skeleton, open_skeleton
from mlxlora.train.fitting import Fitter, more_than_needed
from mlxlora.train.forward import Forward
from mlxlora.train.recompute import trained_blocks
from mlxlora.train.session import QUICK_ROWS
from mlxlora.train.thin import made_up, thin, words_of, zeros

TRIED_WORDS = 256
CERTAIN = 0.85  # of a forecast peak is needed for certain
FOUR_BITS = 4.5 / 8  # bytes a weight, scales and biases of groups of 64 included
LENGTH_STEP = 64


@dataclass(frozen=True)
class Rows:
    """What is known of the rows: their sizes (predictions, supervised), sampled."""

    sizes: list[Size]
    longest: int
    count: int
    validated: int


@dataclass(frozen=True)
class Change:
    """Something to change so that a run needs less."""

    what: str
    option: str  # as the command line takes it
    saves: int  # bytes of the peak
    fits: bool  # with this change alone


@dataclass(frozen=True)
class Forecast:
    """Bytes, seconds and changes. cache: freed arrays that MLX keeps, beside the peak."""

    budget: int
    base: int
    adapter: int  # with gradients and the optimizer's state
    activations: int
    working: int  # blocks of logits and of attention, and whatever else comes and goes
    cache: int
    tokens_per_microbatch: int
    checkpoint_blocks: bool
    packed: bool
    longest: int
    updates: int
    seconds_per_update: float
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def parts(self) -> dict[str, int]:
        """What the peak consists of."""
        return {
            "base": self.base,
            "adapter": self.adapter,
            "activations": self.activations,
            "working": self.working,
        }

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak + self.cache <= self.budget

    @property
    def seconds(self) -> float:
        return self.updates * self.seconds_per_update


class Forecaster:
    """A run on a skeleton. Raises what training would for options that cannot be honoured."""

    def __init__(self, run: RunConfig, skeleton: Skeleton, budget: int, rows: Rows) -> None:
        self.run, self.skeleton, self.rows = run, skeleton, rows
        self.budget, self.cache = budget, cache_limit(budget)
        self.model = skeleton.model
        prepare(self.model, run.lora, run.train.seed, known=False)
        self.fitter = Fitter(
            self.model,
            tried_forward(self.model),
            run.train,
            rows.sizes,
            rows.longest,
            fill=zeros,
            words=words_of(self.model),
            first=rows.validated > QUICK_ROWS,
        )

    @cached_property
    def forecast(self) -> Forecast:
        fitter, rows = self.fitter, self.rows
        cut = fitter.choose(self.budget - self.cache)
        need = fitter.need(cut.tokens, cut.checkpoint_blocks)
        share = fitter.tokens_per_update(cut.tokens) / need.tokens
        activations = min(need.activations, need.bytes)
        found = Forecast(
            budget=self.budget,
            base=fitter.held.base,
            adapter=fitter.held.adapter,
            activations=activations,
            working=need.bytes - activations,
            cache=self.cache,
            tokens_per_microbatch=cut.tokens,
            checkpoint_blocks=cut.checkpoint_blocks,
            packed=fitter.packed,
            longest=rows.longest,
            updates=self.run.train.length(rows.count),
            seconds_per_update=need.seconds * share + need.seconds_update,
            changes=(),
            notes=fitter.forward.notes,
        )
        return found if found.fits else replace(found, changes=self._changes(found))

    def _changes(self, now: Forecast) -> tuple[Change, ...]:
        """What would save memory, the changes that suffice alone first, then by what they save."""
        excess = now.peak + now.cache - self.budget
        found = [
            *self._other_cuts(now),
            *self._smaller_base(),
            *(
                self._lora(now)
                if self.run.lora.method == "full"
                else self._less_trained(now, excess)
            ),
            *self._shorter_rows(now, excess),
        ]
        changes = [Change(*one, fits=one[2] >= excess) for one in found if one[2] > 0]
        return tuple(sorted(changes, key=lambda change: (not change.fits, -change.saves)))

    def _other_cuts(self, now: Forecast) -> list[tuple[str, str, int]]:
        found, tokens = [], now.tokens_per_microbatch
        longest = self.fitter.longest_seen
        if tokens > longest:
            saves = now.peak - self.fitter.peak(longest, now.checkpoint_blocks)
            option = f"--set train.tokens_per_microbatch={longest}"
            found.append(("fewer tokens at once", option, saves))
        if not now.checkpoint_blocks:
            saves = now.peak - self.fitter.peak(tokens, True)
            option = "--set train.checkpoint_blocks=true"
            found.append(("blocks computed again in the backward pass", option, saves))
        return found

    def _smaller_base(self) -> list[tuple[str, str, int]]:
        saves = wide = 0
        for module in self.model.modules():
            if isinstance(module, QUANTIZED):
                size = module.weight.size * 32 // module.bits
                now = module.weight.nbytes + module.scales.nbytes
            elif hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0:
                size, now = module.weight.size, module.weight.nbytes
            else:
                continue
            wide += 4 * size
            saves += max(0, now - int(size * FOUR_BITS))
        if self.run.lora.method == "full" or (on_cpu() and wide <= KEPT_BYTES):
            return []
        name = self.run.model.rstrip("/").rpartition("/")[2] + "-4bit"
        what = f"a base at 4 bits (mlxlora quantize --model {self.run.model} --out {name})"
        return [(what, f"--model {name}", saves)]

    def _lora(self, now: Forecast) -> list[tuple[str, str, int]]:
        run = replace(self.run, lora=LoraConfig())
        other = Forecaster(run, open_skeleton(self.run.model), self.budget, self.rows)
        peak = other.forecast.peak
        return [("an adapter instead of every weight", "--method lora", now.peak - peak)]

    def _less_trained(self, now: Forecast, excess: int) -> list[tuple[str, str, int]]:
        blocks, rank = len(trained_blocks(self.model)), self.run.lora.rank
        found = []
        if blocks > 1:
            each = (now.activations + now.adapter) / blocks
            fewer = min(max(1, blocks - math.ceil(excess / max(1.0, each))), blocks // 2)
            last = "the last block" if fewer == 1 else f"the last {fewer} blocks"
            what = f"adapters in {last} only, of {blocks}"
            found.append((what, f"--set lora.blocks={fewer}", int((blocks - fewer) * each)))
        if rank > 1:
            lower = max(1, rank // 4)
            saves = int(now.adapter * (1 - lower / rank))
            found.append((f"rank {lower} instead of {rank}", f"--rank {lower}", saves))
        return found

    def _shorter_rows(self, now: Forecast, excess: int) -> list[tuple[str, str, int]]:
        longest = self.fitter.longest_seen
        if longest <= LENGTH_STEP or now.tokens_per_microbatch > longest:
            return []  # the longest row is not what decides
        each = (now.activations + now.working / 2) / longest
        fitting = int(longest - excess / max(each, 1e-9)) // LENGTH_STEP * LENGTH_STEP
        length = max(min(fitting, longest // 2), longest // 8, LENGTH_STEP)
        saves = int((longest - length) * each)
        return [(f"rows cut at {length} tokens", f"--max-length {length}", saves)]


def forecast(
    run: RunConfig, budget: int | None = None, *, trust_remote_code: bool = False
) -> Forecast:
    """What the run needs, in a budget of bytes (None: what this machine offers).

    Without data.path, rows of data.max_length are assumed. Raises MlxLoraError for a model,
    rows or options that training would refuse.
    """
    skeleton = open_skeleton(run.model, trust_remote_code=trust_remote_code)
    rows = measured_rows(run, skeleton, trust_remote_code)
    found = Forecaster(run, skeleton, budget or memory_budget(), rows).forecast
    if run.data.path:
        return found
    note = f"no --data given: every row is taken to have data.max_length = {rows.longest} tokens"
    return replace(found, notes=(note, *found.notes))


def measured_rows(run: RunConfig, skeleton: Skeleton, trust_remote_code: bool = False) -> Rows:
    if not run.data.path:
        size = run.data.max_length, run.data.max_length
        return Rows([size] * run.train.batch_size, size[0], 0, 0)
    splits = open_splits(run.data, run.train.seed)
    renderer = Renderer(skeleton.tokenizer(trust_remote_code), run.data)
    skip = run.data.on_bad_row == "skip"
    sizes, longest = sample_sizes(splits.train, renderer, skip)
    if splits.valid is not None:
        longest = max(longest, sample_sizes(splits.valid, renderer, skip)[1])
    return Rows(sizes, longest, len(splits.train), len(splits.valid or ()))


def tried_forward(model: nn.Module) -> Forward:
    """What a skeleton allows, tried with two of its blocks and made-up weights."""
    with thin(model, model.layers[:2], TRIED_WORDS, made_up):
        return Forward(model)


def refuse_what_cannot_fit(run: RunConfig, *, trust_remote_code: bool = False) -> None:
    """Raise ConfigError for a run that no cut makes fit this machine, before weights are loaded.

    Costs next to nothing where twice a rough estimate fits. A run that might fit is let through:
    forecasts are a seventh off at worst, and what is offered is more than what is planned with.
    """
    skeleton = open_skeleton(run.model, trust_remote_code=trust_remote_code)
    if skeleton.bytes > offered_memory():
        raise ConfigError(_too_large(run.model, skeleton))
    prepare(skeleton.model, run.lora, run.train.seed, known=False)
    again = run.train.checkpoint_blocks is True
    if more_than_needed(skeleton.model, run.data.max_length, again) <= memory_budget():
        return
    skeleton = open_skeleton(run.model, trust_remote_code=trust_remote_code)
    rows = measured_rows(run, skeleton, trust_remote_code)
    found = Forecaster(run, skeleton, memory_budget(), rows).forecast
    if CERTAIN * found.peak > offered_memory():
        raise ConfigError(_refusal(found))


def _too_large(name: str, skeleton: Skeleton) -> str:
    """Why a base is refused whose weights alone are more than there is; no probe is needed."""
    said = (
        f"this run cannot fit: the weights of {name} alone take {gigabytes(skeleton.bytes)} here, "
        f"and this machine offers {gigabytes(memory_budget())}."
    )
    modules = list(skeleton.model.modules())
    if any(isinstance(module, QUANTIZED) for module in modules):
        return f"{said}\n  Choose a smaller base."
    weights = sum(a.size for _, a in tree_flatten(skeleton.model.parameters()))
    small = gigabytes(int(FOUR_BITS * weights))
    command = f"mlxlora quantize --model {name} --bits 4 --out {Path(name).name}-4bit"
    return f"{said}\n  At 4 bits they take about {small}: {command}"


def _refusal(found: Forecast) -> str:
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in found.parts.items())
    lines = [
        f"this run cannot fit: it needs about {gigabytes(found.peak)} ({parts}), and this machine "
        f"offers {gigabytes(found.budget)}.",
        *(
            f"  {change.option}  saves {gigabytes(change.saves)}"
            + (", which is enough" if change.fits else "")
            for change in found.changes
        ),
    ]
    return "\n".join(lines)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
