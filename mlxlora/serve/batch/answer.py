"""One answer in the making: tokens to text, stops, log-probabilities, and who is told."""

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer

from mlxlora.errors import MlxLoraError
from mlxlora.serve.batch.adapters import Served
from mlxlora.serve.batch.rows import Row
from mlxlora.serve.batch.sampling import Processor, processors
from mlxlora.serve.grammar.following import Grammar
from mlxlora.serve.orders import End, Event, Fault, Order, Sink, Spelled
from mlxlora.serve.text import Stops


class Answer:
    """Lives in the engine's thread; only .cancelled is set from others."""

    def __init__(
        self,
        order: Order,
        sink: Sink,
        served: Served,
        row: Row,
        tokenizer: Any,
        grammar: Grammar | None,
    ) -> None:
        self.order, self.served, self.row = order, served, row
        self.uid: int | None = None  # in its lane's generator, once it is there
        self.cached = 0  # tokens of the prompt that need not be computed
        self.tokens = 0  # generated
        self.cancelled = False
        self.done = False
        self._sink: Sink | None = sink
        self._detokenizer = _detokenizer(tokenizer, order.continues)
        self._stops = Stops(order.stops)
        self._grammar = grammar
        self._fault: Exception | None = None
        self._last: Event | None = None

    def processors(self) -> list[Processor]:
        """What changes this row's logits. A fault in one is this answer's, not the batch's."""
        own = processors(self.order.sampling)
        if self._grammar is not None:
            own.append(self._grammar)
        return [self._guarded(one) for one in own]

    def token(self, token: int, logprobs: mx.array, reason: str | None) -> bool:
        """Take the next token, logprobs (V,); returns whether the answer is complete.

        reason: "stop" if this token only ends the answer, "length" if it is the last.
        """
        if self._fault is not None:
            theirs = isinstance(self._fault, MlxLoraError)  # of the input, by definition
            kind = "" if theirs else f"{type(self._fault).__name__}: "
            self.fail(f"{kind}{self._fault}", ours=not theirs)
            return True
        self.tokens += 1
        if reason == "stop":
            self._finish("stop")
            return True
        text = self._text(lambda: self._detokenizer.add_token(token))
        if text is None:
            return True
        spelled = None if self.order.top is None else _spelled(token, logprobs, self.order.top)
        piece, stopped = self._stops.feed(text, spelled)
        if piece is not None:
            self._say(piece)
        if stopped:
            self._end("stop")
        elif reason is not None:
            self._finish(reason)
        elif self._grammar is not None and self._grammar.finished:
            self._finish("stop")
        return self.done

    def cancel(self) -> None:
        if not self.done:
            self._end("cancelled")

    def fail(self, message: str, *, ours: bool) -> None:
        if not self.done:
            self._last_word(Fault(message, ours))

    def _text(self, step: Callable[[], None]) -> str | None:
        """The text that a step of the detokenizer makes certain; None if it fails."""
        try:
            step()
            return str(self._detokenizer.last_segment)
        except (TypeError, LookupError):  # of mlx-lm's table of the tokens' spellings
            self.fail("the model gave a token that its tokenizer cannot spell", ours=True)
            return None

    def _finish(self, reason: str) -> None:
        """The last of the text, then the end."""
        text = self._text(self._detokenizer.finalize)
        if text is None:
            return
        piece, stopped = self._stops.feed(text, None)
        for rest in (piece, None if stopped else self._stops.flush()):
            if rest is not None:
                self._say(rest)
        self._end("stop" if stopped else reason)

    def _end(self, reason: str) -> None:
        self._last_word(End(reason, len(self.order.prompt), self.cached, self.tokens))

    def _say(self, event: Event) -> None:
        """To whoever asked. One who cannot be told any more is not told again."""
        try:
            if self._sink is not None:
                self._sink(event)
        except Exception as error:  # whatever it is, the others go on
            logging.getLogger(__name__).warning("an answer could not be told: %s", error)
            self._sink = None

    def _last_word(self, last: Event) -> None:
        self.done = True
        self._last = last
        if self._grammar is not None:
            self._grammar.close()

    def tell_last(self) -> None:
        """Tell that it is done; after everything that counts answers knows it too."""
        if self._last is not None:
            self._say(self._last)
            self._last = None

    def _guarded(self, processor: Processor) -> Processor:
        def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
            try:
                return logits if self._fault else processor(tokens, logits)
            except Exception as error:  # whatever it is, the other rows go on
                self._fault = error
                return logits

        return guarded


def _detokenizer(tokenizer: Any, continues: bool) -> Any:
    """mlx-lm's; it drops the space that a text begins with unless there was text before."""
    found = tokenizer.detokenizer
    if continues and isinstance(found, BPEStreamingDetokenizer | SPMStreamingDetokenizer):
        found.text, found.offset = " ", 1
    return found


def _spelled(token: int, logprobs: mx.array, count: int) -> Spelled:
    values = np.array(logprobs.astype(mx.float32))
    best = np.argpartition(-values, min(count, len(values) - 1))[:count]
    top = sorted(((int(i), float(values[i])) for i in best), key=lambda pair: -pair[1])
    return Spelled(token, float(values[token]), tuple(top))
