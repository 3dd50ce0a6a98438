"""One run as it goes: the feed, the stepper, the best so far, and what is saved when.

The directory and the model's preparation are loop.py's; here everything changes, and only here.
"""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from threading import Event as Flag
from typing import Any

import mlx.core as mx

from mlxlora.base import Base, trainable_size, training_mode
from mlxlora.config import RunConfig
from mlxlora.data.ahead import ahead
from mlxlora.data.batches import Cursor, Feed, Tally, Update
from mlxlora.data.records import Splits
from mlxlora.data.render import Renderer
from mlxlora.errors import DataError, TrainError
from mlxlora.generate import answer, prompt_tokens
from mlxlora.lora.attach import collect, low_rank_layers
from mlxlora.memory import peak_memory
from mlxlora.train.events import Done, Eval, Event, Sample, Saved, Start, Step, perplexity
from mlxlora.train.optim import learning_rate, make_optimizer, peak_rate
from mlxlora.train.step import Stepper
from mlxlora.train.validate import Validator, batches_of
from mlxlora.train.ways import Ways

VALIDATIONS = 10  # a run, when eval.every is 0
QUICK_ROWS = 128  # of validation, measured before the first update
BAD_ROWS_SHOWN = 8
AHEAD = 2  # updates rendered and cut while another is computed


@dataclass
class _Best:
    loss: float = math.inf
    update: int = 0
    since: int = 0  # validations without a better one


class Session:
    """The one owner of a run's changing state."""

    def __init__(
        self,
        directory: Path,
        run: RunConfig,
        base: Base,
        splits: Splits,
        renderer: Renderer,
        ways: Ways,
        parameters: int,
        stop: Flag,
    ) -> None:
        self.run, self.base, self.splits, self.renderer = run, base, splits, renderer
        self.ways, self.parameters, self.stop = ways, parameters, stop
        self.directory = directory
        self.skip = run.data.on_bad_row == "skip"
        self.feed = Feed(
            splits.train, renderer, run.train.batch_size, ways.layout.cut, run.train.seed, self.skip
        )
        self.updates = run.train.updates or math.ceil(
            run.train.epochs * self.feed.updates_per_epoch
        )
        self.peak = peak_rate(run.train, run.lora, parameters)
        self.stepper = Stepper(base.model, make_optimizer(run.train), run.train.clip, ways.forward)
        self.validator = Validator(ways.forward)
        self.every = run.eval.every or max(1, round(self.updates / VALIDATIONS))
        self.best = _Best()
        self.before: float | None = None  # validation loss of the base
        self.first: Any = None  # the first weights, until they are validated
        self.tally = Tally()  # of the first epoch
        self.train_loss = math.nan
        self.update = 0
        self.last: Saved | None = None
        # The weights before the last update: known to give a finite loss. They are shared
        # arrays, not copies; of whole models they would be too many.
        self.proven: Any = None
        self.started = time.perf_counter()

    def events(self) -> Iterator[Event]:
        """The run. If a row cannot be used after all, what was learned before it is saved."""
        try:
            yield from self._events()
        except DataError as error:
            if not self.update:
                raise
            saved = self._save_last("interrupted")
            raise DataError(f"{error}\nWhat was learned before it is in {saved.path}.") from error

    def _events(self) -> Iterator[Event]:
        mx.reset_peak_memory()
        yield self._start()
        if self.splits.valid is not None:
            self.first = self.base.model.trainable_parameters()
            if len(self.splits.valid) <= QUICK_ROWS:
                yield self._validate_first()
        reason = "finished"
        wanted = islice(self.feed.updates(Cursor()), self.updates)
        with closing(ahead(wanted, AHEAD)) as updates:
            began = time.perf_counter()
            for update in updates:
                yield from self._step(update, began)
                if self.stop.is_set() and self.update < self.updates:
                    reason = "interrupted"
                    break
                if self.update % self.every == 0 or self.update == self.updates:
                    yield from self._milestone()
                    if self._hopeless():
                        reason = "early stop"
                        break
                began = time.perf_counter()
        saved = self.last is not None and self.last.update == self.update
        if (reason == "interrupted" or not self.best.update) and not saved:
            yield self._save_last(reason)
        yield self._done(reason)

    def _step(self, update: Update, began: float) -> Iterator[Event]:
        """One optimizer update; an update without a supervised token only counts.

        began: when its rows began to be waited for.
        """
        self.update += 1
        rate = learning_rate(self.run.train, self.peak, self.update, self.updates)
        loss = norm = math.nan
        tokens = 0
        if update.batches:
            with training_mode(self.base.model):
                before = self.base.model.trainable_parameters()
                loss, norm, tokens = self.stepper.step(
                    update.batches, self.run.train.seed, self.update, rate
                )
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._not_a_number(loss, norm, update.rows)
            if self.run.lora.method != "full":
                self.proven = before
            self.train_loss = loss
        if update.cursor.epoch == 0 or update.cursor == Cursor(1, 0):
            self.tally += update.tally
        epoch = update.cursor.epoch + update.cursor.position / len(self.splits.train)
        seconds = time.perf_counter() - began
        yield Step(self.update, epoch, loss, tokens, rate, norm, seconds, peak_memory())

    def _milestone(self) -> Iterator[Event]:
        """Validate and keep the best; without a validation set, keep the present."""
        if self.splits.valid is None:
            yield self._save(self.directory / "adapter", "last")
        else:
            if self.first is not None:
                yield self._validate_first()
            yield (event := self._validate())
            if event.best:
                yield self._save(self.directory / "adapter", "best")
        for prompt in self.run.eval.prompts:
            tokens = prompt_tokens(self.base.tokenizer, prompt, raw=self.splits.kind == "text")
            text = answer(self.base.model, self.base.tokenizer, tokens, self.run.eval.max_tokens)
            yield Sample(self.update, prompt, text)

    def _validate_first(self) -> Eval:
        """Measure the base: the first weights, put back for that if training has begun.

        So that with many validation rows the first update need not wait for all of them.
        """
        trained = self.base.model.trainable_parameters()
        self.base.model.update(self.first)
        self.first = None
        try:
            self.before, tokens, seconds = self._measure()
        finally:
            self.base.model.update(trained)
        return Eval(0, self.before, perplexity(self.before), tokens, False, seconds)

    def _validate(self) -> Eval:
        loss, tokens, seconds = self._measure()
        better = loss < self.best.loss
        if better:
            self.best = _Best(loss, self.update)
        else:
            self.best = replace(self.best, since=self.best.since + 1)
        return Eval(self.update, loss, perplexity(loss), tokens, better, seconds)

    def _measure(self) -> tuple[float, int, float]:
        """(validation loss, supervised tokens, seconds) of the present weights."""
        assert self.splits.valid is not None
        tic = time.perf_counter()
        batches = batches_of(self.splits.valid, self.renderer, self.ways.layout.cut, self.skip)
        loss, tokens = self.validator(batches)
        return loss, tokens, time.perf_counter() - tic

    def _hopeless(self) -> bool:
        patience = self.run.eval.patience
        return bool(patience) and self.best.since >= patience and self.update < self.updates

    def _not_a_number(self, loss: float, norm: float, rows: tuple[int, ...]) -> None:
        """Stop before the weights are touched; keep the last that are known to be good."""
        failed = self.update
        places = [self.splits.train.file.where(row) for row in rows[:BAD_ROWS_SHOWN]]
        more = f" and {len(rows) - len(places)} more" if len(rows) > len(places) else ""
        raise TrainError(
            f"update {failed}: the loss is {loss} and the gradient norm {norm}, so training "
            f"stopped before using it. Its rows: {', '.join(places)}{more}.\n"
            + self._keep_good()
            + f"A lower train.learning_rate (now {self.peak:g}) usually helps; otherwise look at "
            "those rows."
        )

    def _keep_good(self) -> str:
        if self.proven is not None:
            self.base.model.update(self.proven)
            self.update -= 2  # this update was not applied, and the one before it is in doubt
            self._save_last("interrupted")
        if self.last is None:
            return "Nothing was learned before it. "
        return f"Good weights, from update {self.last.update}, are in {self.last.path}. "

    def _save_last(self, reason: str) -> Saved:
        """The present weights: as the adapter if none was better, else beside it."""
        place = self.directory / "adapter"
        if self.best.update:
            place = self.directory / f"last-{self.update:08d}"
        return self._save(place, "interrupted" if reason == "interrupted" else "last")

    def _save(self, path: Path, why: str) -> Saved:
        collect(self.base.model, self.run.lora, self._provenance()).save(path, replace=True)
        self.last = Saved(self.update, str(path), why)
        return self.last

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
            shapes=self.ways.layout.shapes,
            device=str(mx.default_device()),
            products=self.ways.products,
            packed=self.ways.layout.packed,
            checkpoint_blocks=self.ways.forward.checkpoint_blocks,
            tokens_per_microbatch=self.ways.layout.tokens,
            notes=(*self.renderer.notes, *self.ways.forward.notes),
        )

    def _done(self, reason: str) -> Done:
        kept = self.best.loss if self.best.update else None
        return Done(
            update=self.update,
            reason=reason,
            adapter=str(self.directory / "adapter"),
            last=self.last.path if self.last else "",
            best_update=self.best.update or self.update,
            valid_loss_before=self.before,
            valid_loss=kept,
            seconds=time.perf_counter() - self.started,
            dropped_rows=self.tally.dropped + self.tally.refused,
            truncated_rows=self.tally.truncated,
            peak_memory=peak_memory(),
        )
