"""train(run): the whole of a training run as a stream of events.

A run is a directory: run.toml (resolved options), log.jsonl (an object per event) and
adapter/ (the best by validation loss; the last where there is no validation set). The base
is never changed: when the generator ends, however it ends, the adapter is detached.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from threading import Event as Flag
from typing import Any

import mlx.core as mx

from mlxlora.base import Base, load, trainable_size, training_mode
from mlxlora.config import RunConfig
from mlxlora.data.batches import Cursor, Feed, Shape, choose_shapes, sample_lengths
from mlxlora.data.records import Splits, open_splits
from mlxlora.data.render import Renderer
from mlxlora.errors import ConfigError, TrainError
from mlxlora.files import atomic_file, refuse_existing
from mlxlora.generate import answer, prompt_tokens
from mlxlora.lora.attach import collect, detach, low_rank_layers, new_layers, prepare_full
from mlxlora.machine import awake, peak_memory, token_budget
from mlxlora.quantized import QUANTIZED
from mlxlora.train.events import Done, Eval, Event, Sample, Saved, Start, Step, perplexity, to_json
from mlxlora.train.optim import learning_rate, make_optimizer, peak_rate
from mlxlora.train.step import Stepper
from mlxlora.train.validate import Validator, batches_of

VALIDATIONS = 10  # a run, when eval.every is 0
BAD_ROWS_SHOWN = 8


def train(run: RunConfig, base: Base | None = None, *, stop: Flag | None = None) -> Iterator[Event]:
    """Train as run says, yielding events; everything is checked before the first.

    base saves loading run.model again. Setting stop ends the run after the current update,
    with the weights saved. Raises MlxLoraError for anything wrong with the input, and
    TrainError, the last good weights saved, if the loss stops being a number.
    """
    check(run)
    splits = open_splits(run.data, run.train.seed)
    base = base or load(run.model)
    renderer = Renderer(base.tokenizer, run.data)
    shapes = _shapes(run, splits, renderer)
    make_optimizer(run.train)  # refuses what it cannot honour, before anything is written
    detach(base.model)
    parameters = base.parameters
    try:
        _prepare(base, run)
        directory = Path(run.out)
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_file(directory / "run.toml") as file:
            file.write(run.to_toml().encode())
        session = _Session(run, base, splits, renderer, shapes, parameters, stop or Flag())
        with awake(), (directory / "log.jsonl").open("a", encoding="utf-8") as log:
            for event in session.events():
                log.write(to_json(event) + "\n")
                log.flush()
                yield event
    finally:
        detach(base.model)
        mx.clear_cache()


def check(run: RunConfig) -> None:
    """Raise ConfigError or ExportError for a run that cannot start, before loading anything."""
    missing = [key for key in ("model", "out") if not getattr(run, key)]
    missing += [] if run.data.path else ["data.path"]
    if missing:
        raise ConfigError(f"not given: {', '.join(missing)}")
    refuse_existing(Path(run.out))


def _shapes(run: RunConfig, splits: Splits, renderer: Renderer) -> tuple[Shape, ...]:
    budget = run.train.tokens_per_microbatch
    tokens = token_budget() if budget == "auto" else int(budget)
    skip = run.data.on_bad_row == "skip"
    lengths, complete = sample_lengths(splits.train, renderer, skip)
    longest = max(lengths) if complete else run.data.max_length
    if splits.valid is not None:
        more, complete = sample_lengths(splits.valid, renderer, skip)
        longest = max(longest, *more) if complete else run.data.max_length
    return choose_shapes(lengths, longest, run.train.batch_size, tokens)


def _prepare(base: Base, run: RunConfig) -> None:
    """Put what is trained into the model: fresh low-rank layers, or all weights."""
    if run.lora.method == "full":
        if any(isinstance(module, QUANTIZED) for module in base.model.modules()):
            raise ConfigError("lora.method = 'full' cannot train quantized weights; use 'lora'")
        prepare_full(base.model)
    else:
        new_layers(base.model, run.lora, run.train.seed)


@dataclass
class _Best:
    loss: float = math.inf
    update: int = 0
    since: int = 0  # validations without a better one


class _Session:
    """The one owner of a run's changing state."""

    def __init__(
        self,
        run: RunConfig,
        base: Base,
        splits: Splits,
        renderer: Renderer,
        shapes: tuple[Shape, ...],
        parameters: int,
        stop: Flag,
    ) -> None:
        self.run, self.base, self.splits, self.renderer = run, base, splits, renderer
        self.shapes, self.parameters, self.stop = shapes, parameters, stop
        self.directory = Path(run.out)
        self.skip = run.data.on_bad_row == "skip"
        self.feed = Feed(
            splits.train, renderer, run.train.batch_size, shapes, run.train.seed, self.skip
        )
        self.updates = run.train.updates or math.ceil(
            run.train.epochs * self.feed.updates_per_epoch
        )
        self.peak = peak_rate(run.train, run.lora, parameters)
        self.stepper = Stepper(base.model, make_optimizer(run.train), run.train.clip)
        self.validator = Validator(base.model)
        self.every = run.eval.every or max(1, round(self.updates / VALIDATIONS))
        self.best = _Best()
        self.before: float | None = None  # validation loss of the base
        self.train_loss = math.nan
        self.update = 0
        self.started = time.perf_counter()

    def events(self) -> Iterator[Event]:
        mx.reset_peak_memory()
        yield self._start()
        if self.splits.valid is not None:
            yield (event := self._validate())
            self.before = event.loss
        reason = "finished"
        for update in self.feed.updates(Cursor()):
            if self.update >= self.updates:
                break
            yield from self._step(update)
            if self.stop.is_set() and self.update < self.updates:
                reason = "interrupted"
                break
            if self.update % self.every == 0 or self.update == self.updates:
                yield from self._milestone()
                if self._hopeless():
                    reason = "early stop"
                    break
        if reason == "interrupted" or not self.best.update:
            yield self._save_last(reason)
        yield self._done(reason)

    def _step(self, update: Any) -> Iterator[Event]:
        """One optimizer update; an update without a supervised token only counts."""
        tic = time.perf_counter()
        self.update += 1
        rate = learning_rate(self.run.train, self.peak, self.update, self.updates)
        loss = norm = math.nan
        tokens = 0
        if update.batches:
            with training_mode(self.base.model):
                loss, norm, tokens, gradients = self.stepper.gradients(
                    update.batches, self.run.train.seed, self.update
                )
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._not_a_number(loss, norm, update.rows)
            self.stepper.apply(gradients, norm, tokens, rate)
            self.train_loss = loss
        epoch = update.cursor.epoch + update.cursor.position / len(self.splits.train)
        seconds = time.perf_counter() - tic
        yield Step(self.update, epoch, loss, tokens, rate, norm, seconds, peak_memory())

    def _milestone(self) -> Iterator[Event]:
        """Validate and keep the best; without a validation set, keep the present."""
        if self.splits.valid is None:
            yield self._save(self.directory / "adapter", "last")
        else:
            yield (event := self._validate())
            if event.best:
                yield self._save(self.directory / "adapter", "best")
        for prompt in self.run.eval.prompts:
            tokens = prompt_tokens(self.base.tokenizer, prompt, raw=self.splits.kind == "text")
            text = answer(self.base.model, self.base.tokenizer, tokens, self.run.eval.max_tokens)
            yield Sample(self.update, prompt, text)

    def _validate(self) -> Eval:
        assert self.splits.valid is not None
        tic = time.perf_counter()
        batches = batches_of(self.splits.valid, self.renderer, self.shapes, self.skip)
        loss, tokens = self.validator(batches)
        better = self.update > 0 and loss < self.best.loss
        if better:
            self.best = _Best(loss, self.update)
        elif self.update > 0:
            self.best = replace(self.best, since=self.best.since + 1)
        seconds = time.perf_counter() - tic
        return Eval(self.update, loss, perplexity(loss), tokens, better, seconds)

    def _hopeless(self) -> bool:
        patience = self.run.eval.patience
        return bool(patience) and self.best.since >= patience and self.update < self.updates

    def _not_a_number(self, loss: float, norm: float, rows: tuple[int, ...]) -> None:
        saved = self._save_last("interrupted")
        places = [self.splits.train.file.where(row) for row in rows[:BAD_ROWS_SHOWN]]
        more = f" and {len(rows) - len(places)} more" if len(rows) > len(places) else ""
        raise TrainError(
            f"update {self.update}: the loss is {loss} and the gradient norm {norm}, so training "
            f"stopped before using it. Its rows: {', '.join(places)}{more}.\n"
            f"The weights before it are in {saved.path}. A lower train.learning_rate (now "
            f"{self.peak:g}) usually helps; otherwise look at those rows."
        )

    def _save_last(self, reason: str) -> Saved:
        """The present weights: as the adapter if there is no better one, else beside it."""
        place = self.directory / "adapter"
        if self.best.update:
            place = self.directory / f"last-{self.update:08d}"
        return self._save(place, "interrupted" if reason == "interrupted" else "last")

    def _save(self, path: Path, why: str) -> Saved:
        collect(self.base.model, self.run.lora, self._provenance()).save(path, replace=True)
        return Saved(self.update, str(path), why)

    def _provenance(self) -> dict[str, Any]:
        files = {
            name: {"path": str(file.path), "rows": len(file), "digest": file.digest}
            for name, file in self.splits.files().items()
        }
        return {
            "base": self.base.identity.to_dict(),
            "data": {"format": self.splits.kind, "files": files},
            "run": self.run.to_dict(),
            "metrics": {
                "update": self.update,
                "updates": self.updates,
                "train_loss": self.train_loss,
                "valid_loss": self.best.loss if self.best.update == self.update else None,
                "valid_loss_before": self.before,
            },
            "versions": {name: version(name) for name in ("mlxlora", "mlx", "mlx-lm")},
        }

    def _start(self) -> Start:
        valid = self.splits.valid
        return Start(
            updates=self.updates,
            rows=len(self.splits.train),
            valid_rows=len(valid) if valid is not None else 0,
            skipped_rows=sum(self.splits.skipped().values()),
            trainable=trainable_size(self.base.model),
            parameters=self.parameters,
            adapted=len(list(low_rank_layers(self.base.model))),
            learning_rate=self.peak,
            shapes=self.shapes,
            device=str(mx.default_device()),
            notes=tuple(self.renderer.notes),
        )

    def _done(self, reason: str) -> Done:
        kept = self.best.loss if self.best.update else None
        tally = self.feed.tally
        return Done(
            update=self.update,
            reason=reason,
            adapter=str(self.directory / "adapter"),
            best_update=self.best.update or self.update,
            valid_loss_before=self.before,
            valid_loss=kept,
            seconds=time.perf_counter() - self.started,
            dropped_rows=tally.dropped + tally.refused,
            truncated_rows=tally.truncated,
            peak_memory=peak_memory(),
        )
