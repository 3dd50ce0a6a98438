"""One run as it goes: the feed, the stepper, validation, the best so far.

Where it stands is a Progress, replaced as it goes; what is saved when is saving.py's, the
directory and the model's preparation are loop.py's.
"""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event as Flag
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora.base import Base, trainable_size, training_mode
from mlxlora.config import RunConfig
from mlxlora.data.ahead import ahead
from mlxlora.data.batches import Cursor, Feed, Update
from mlxlora.data.records import Splits
from mlxlora.data.render import Renderer
from mlxlora.errors import CheckpointError, DataError, TrainError
from mlxlora.lora.attach import low_rank_layers
from mlxlora.memory import footprint, memory_budget, peak_memory
from mlxlora.train.checkpoint import Best, Point, Progress, TrainState
from mlxlora.train.directory import Log
from mlxlora.train.events import (
    Done,
    Eval,
    Event,
    Resumed,
    Skipped,
    Start,
    Step,
    perplexity,
)
from mlxlora.train.optim import learning_rate, make_optimizer, peak_rate
from mlxlora.train.places import ADAPTER, LOG
from mlxlora.train.samples import samples
from mlxlora.train.saving import Saver
from mlxlora.train.step import Stepper
from mlxlora.train.validate import Validator, batches_of
from mlxlora.train.ways import Ways

QUICK_ROWS = 128  # of validation, measured before the first update
BAD_IN_A_ROW = 3  # updates that are no number, then training stops
BAD_ROWS_SHOWN = 8
AHEAD = 2  # updates rendered and cut while another is computed


@dataclass(frozen=True)
class Job:
    """What a session is given, all of it ready: nothing here changes."""

    directory: Path
    run: RunConfig
    base: Base  # with what is trained in it
    splits: Splits
    renderer: Renderer
    ways: Ways
    parameters: int  # of the base alone


class Session:
    """The one owner of a run's changing state."""

    def __init__(
        self,
        job: Job,
        stop: Flag,
        state: TrainState | None = None,
        resumed: Resumed | None = None,
    ) -> None:
        """state: where to go on from; resumed: how to say so, if this is no new run."""
        run, base, ways = job.run, job.base, job.ways
        self.job, self.run, self.base, self.splits = job, run, base, job.splits
        self.stop, self.resumed = stop, resumed
        self.skip = run.data.on_bad_row == "skip"
        self.feed = Feed(
            job.splits.train,
            job.renderer,
            run.train.batch_size,
            ways.layout.cut,
            run.train.seed,
            self.skip,
        )
        updates = run.train.length(len(job.splits.train))
        self.progress = state.progress if state else Progress(updates)
        self.peak = peak_rate(run.train, run.lora, job.parameters)
        self.stepper = Stepper(base.model, make_optimizer(run.train), run.train.clip, ways.forward)
        self.validator = Validator(ways.forward)
        self.saver = Saver(job.directory, run, base, job.splits, self.peak)
        self.every = run.eval.interval(updates)
        # The first weights, until they are validated.
        self.first: Any = base.model.trainable_parameters()
        if self.splits.valid is None or self.progress.before is not None:
            self.first = None
        if state is not None:
            self._restore(state)
        # The weights before the last update, and its number less one: known to give a finite
        # loss. They are shared arrays, not copies; of whole models they would be too many.
        self.proven: tuple[int, Any] | None = None
        self.started = time.perf_counter()
        self.spent = self.progress.seconds  # before this session
        self.log = Log(job.directory / LOG, self.progress.log_bytes)

    def events(self) -> Iterator[Event]:
        """The run. If a row cannot be used after all, what was learned before it is saved."""
        try:
            yield from self._events()
        except DataError as error:
            if not self.progress.update:
                raise
            saved = self.saver.present(self.progress, "interrupted")
            raise DataError(f"{error}\nWhat was learned before it is in {saved.path}.") from error

    def _restore(self, state: TrainState) -> None:
        own = self.base.model.trainable_parameters()
        try:
            strange = [k for k, v in dict(tree_flatten(own)).items() if not _same(v, state, k)]
            if strange or len(state.weights) != len(tree_flatten(own)):
                raise ValueError(f"weights {strange[0] if strange else 'of other layers'}")
            self.stepper.restore_optimizer(state.optimizer)
            self.base.model.update(tree_unflatten(list(state.weights.items())))
        except (KeyError, ValueError) as error:
            self.base.model.update(own)
            raise CheckpointError(
                f"the checkpoint of update {state.progress.update} does not fit this run: {error}"
            ) from error

    def _events(self) -> Iterator[Event]:
        mx.reset_peak_memory()
        yield self._start()
        if self.resumed is not None:
            yield self.resumed
        if self.first is not None and len(self.splits.valid or ()) <= QUICK_ROWS:
            yield self._validate_first()
        if not self.progress.update:
            yield from self._samples()
        reason = "finished"
        # A run that was interrupted before the validation of its last update.
        if self._milestone_due():
            yield from self._milestone()
        updates = self.progress.updates
        wanted = islice(self.feed.updates(self.progress.cursor), updates - self.progress.update)
        with closing(ahead(wanted, AHEAD)) as made:
            began = time.perf_counter()
            while not self._hopeless():
                update = next(made, None)
                if update is None:
                    break
                yield from self._step(update, began)
                if self.stop.is_set() and self.progress.update < updates:
                    reason = "interrupted"
                    break
                before = self.progress.best.update
                if self._milestone_due():
                    yield from self._milestone()
                if self._checkpoint_due(before):
                    yield self._checkpoint()
                began = time.perf_counter()
        if reason != "interrupted" and self._hopeless():
            reason = "early stop"
        yield from self._end(reason)

    def _end(self, reason: str) -> Iterator[Event]:
        """The last saves; a run that was interrupted can go on from its last update."""
        update, last = self.progress.update, self.saver.last
        if reason == "interrupted" and self.saver.checkpointed != update:
            yield self._checkpoint()
        saved = last is not None and last.update == update
        if (reason == "interrupted" or not self.progress.best.update) and not saved:
            yield self.saver.present(self.progress, reason)
        if reason != "interrupted":
            self.saver.finish()
        yield self._done(reason)

    def _step(self, update: Update, began: float) -> Iterator[Event]:
        """One optimizer update; an update without a supervised token only counts.

        began: when its rows began to be waited for.
        """
        number = self.progress.update + 1
        rate = learning_rate(self.run.train, self.peak, number, self.progress.updates)
        loss = norm = math.nan
        tokens = 0
        before = self.base.model.trainable_parameters()
        if update.batches:
            with training_mode(self.base.model):
                loss, norm, tokens = self.stepper.step(
                    update.batches, self.run.train.seed, number, rate
                )
        good = math.isfinite(loss) and math.isfinite(norm)
        progress = replace(self.progress, update=number, cursor=update.cursor)
        if good:
            total, seen = progress.since
            since = (total + loss * tokens, seen + tokens)
            progress = replace(progress, train_loss=loss, bad=0, since=since)
            if self.run.lora.method != "full":
                self.proven = (number - 1, before)
        elif update.batches:
            progress = replace(progress, bad=progress.bad + 1)
        if update.cursor.epoch == 0 or update.cursor == Cursor(1, 0):
            progress = replace(progress, tally=progress.tally + update.tally)
        self.progress = progress
        epoch = update.cursor.epoch + update.cursor.position / len(self.splits.train)
        seconds = time.perf_counter() - began
        yield Step(number, epoch, loss, tokens, rate, norm, seconds, peak_memory())
        if update.batches and not good:
            skipped = self._skipped(number, loss, norm, update.rows)
            yield skipped
            if progress.bad >= BAD_IN_A_ROW:
                raise self._given_up(skipped)

    def _milestone_due(self) -> bool:
        at = self.progress.update
        wanted = at > 0 and (at % self.every == 0 or at == self.progress.updates)
        return wanted and self.progress.validated < at

    def _milestone(self) -> Iterator[Event]:
        """Validate and keep the best; without a validation set, keep the present."""
        if self.splits.valid is None:
            self._point(None)
            yield self.saver.adapter(self.progress, "last")
        else:
            if self.first is not None:
                yield self._validate_first()
            yield (event := self._validate())
            if event.best:
                yield self.saver.adapter(self.progress, "best")
        yield from self._samples()
        self.progress = replace(self.progress, validated=self.progress.update)

    def _samples(self) -> Iterator[Event]:
        raw = self.splits.kind == "text"
        return samples(self.base, self.run.eval, self.progress.update, raw=raw)

    def _checkpoint_due(self, best: int) -> bool:
        """best: the best update before this one.

        With a new best there is one too, unless it is a whole model; while updates fail there is
        none, so that the one to go on from is of weights that were good.
        """
        progress = self.progress
        better = progress.best.update != best and self.run.lora.method != "full"
        return not progress.bad and (better or self.saver.due(progress.update))

    def _checkpoint(self) -> Event:
        seconds = self.spent + time.perf_counter() - self.started
        self.progress = replace(self.progress, seconds=seconds, log_bytes=self.log.settle())
        return self.saver.checkpoint(self.progress, self.stepper)

    def _validate_first(self) -> Eval:
        """Measure the base: the first weights, put back for that if training has begun.

        So that with many validation rows the first update need not wait for all of them.
        """
        trained = self.base.model.trainable_parameters()
        self.base.model.update(self.first)
        self.first = None
        try:
            loss, tokens, seconds = self._measure()
        finally:
            self.base.model.update(trained)
        self.progress = replace(self.progress, before=loss)
        return Eval(0, loss, perplexity(loss), tokens, False, seconds)

    def _validate(self) -> Eval:
        loss, tokens, seconds = self._measure()
        best, update = self.progress.best, self.progress.update
        better = loss < best.loss
        best = Best(loss, update) if better else replace(best, since=best.since + 1)
        self.progress = replace(self.progress, best=best)
        self._point(loss)
        return Eval(update, loss, perplexity(loss), tokens, better, seconds)

    def _point(self, valid_loss: float | None) -> None:
        """Add a point to the run's curve."""
        total, tokens = self.progress.since
        point = Point(self.progress.update, total / tokens if tokens else math.nan, valid_loss)
        self.progress = replace(self.progress, curve=(*self.progress.curve, point), since=(0.0, 0))

    def _measure(self) -> tuple[float, int, float]:
        """(validation loss, supervised tokens, seconds) of the present weights."""
        assert self.splits.valid is not None
        tic = time.perf_counter()
        cut = self.job.ways.layout.cut
        loss, tokens = self.validator(
            batches_of(self.splits.valid, self.job.renderer, cut, self.skip)
        )
        return loss, tokens, time.perf_counter() - tic

    def _hopeless(self) -> bool:
        patience, progress = self.run.eval.patience, self.progress
        finished = progress.update >= progress.updates
        return bool(patience) and progress.best.since >= patience and not finished

    def _skipped(self, number: int, loss: float, norm: float, rows: tuple[int, ...]) -> Skipped:
        places = [self.splits.train.file.where(row) for row in rows[:BAD_ROWS_SHOWN]]
        if len(rows) > len(places):
            places.append(f"and {len(rows) - len(places)} more")
        return Skipped(number, f"the loss is {loss} and the gradient norm {norm}", tuple(places))

    def _given_up(self, skipped: Skipped) -> TrainError:
        """Why training stops; the last good weights are saved."""
        return TrainError(
            f"update {skipped.update}: {skipped.reason}, and it was no better in the "
            f"{BAD_IN_A_ROW - 1} updates before it, so training stopped. None of these updates was "
            f"used. The rows of the last: {', '.join(skipped.rows)}.\n"
            + self._keep_good()
            + f"A lower train.learning_rate (now {self.peak:g}) usually helps; otherwise look at "
            "those rows."
        )

    def _keep_good(self) -> str:
        if self.proven is not None:
            # The update after the proven weights is in doubt: nothing finite came after it.
            update, weights = self.proven
            self.base.model.update(weights)
            saved = self.saver.present(replace(self.progress, update=update), "interrupted")
            return f"Good weights, from update {update}, are in {saved.path}. "
        used = self.progress.update - self.progress.bad
        if not used:
            return "Nothing was learned before it. "
        saved = self.saver.present(replace(self.progress, update=used), "interrupted")
        return (
            f"The weights as update {used} left them are in {saved.path}; nothing finite was "
            "computed with them since. "
        )

    def _start(self) -> Start:
        valid, ways = self.splits.valid, self.job.ways
        return Start(
            updates=self.progress.updates,
            rows=len(self.splits.train),
            valid_rows=len(valid) if valid is not None else 0,
            skipped_rows=sum(self.splits.skipped().values()),
            trainable=trainable_size(self.base.model),
            parameters=self.job.parameters,
            validates_every=self.every,
            adapted=len(list(low_rank_layers(self.base.model))),
            learning_rate=self.peak,
            shapes=ways.layout.shapes,
            device=str(mx.default_device()),
            products=ways.products,
            packed=ways.layout.packed,
            checkpoint_blocks=ways.forward.checkpoint_blocks,
            tokens_per_microbatch=ways.layout.tokens,
            notes=(*self.job.renderer.notes, *ways.forward.notes),
            memory_limit=memory_budget(),
            saves_every=self.run.save.every,
            saves_in=self.saver.rest,
        )

    def _done(self, reason: str) -> Done:
        progress, last = self.progress, self.saver.last
        best, tally = progress.best, progress.tally
        adapter = str(self.job.directory / ADAPTER)
        return Done(
            update=progress.update,
            reason=reason,
            adapter=adapter,
            last=last.path if last else adapter,
            best_update=best.update or progress.update,
            valid_loss_before=progress.before,
            valid_loss=best.loss if best.update else None,
            seconds=self.spent + time.perf_counter() - self.started,
            dropped_rows=tally.dropped + tally.refused,
            truncated_rows=tally.truncated,
            peak_memory=peak_memory(),
            footprint=footprint().most,
        )


def _same(own: mx.array, state: TrainState, name: str) -> bool:
    """Whether the checkpoint has a weight of this name in this shape."""
    return name in state.weights and state.weights[name].shape == own.shape
