"""Record -> Example: token ids and, per token, whether it is trained.

A conversation is rendered as one text by the tokenizer's own chat template, and the spans
of the assistant's turns are found in that text:

* a turn starts where the prompt for it would end at inference (the conversation before it,
  rendered with the generation prompt), so what is trained is what will be generated;
* it ends with the first end-of-sequence token after it (that one is trained: it is how the
  model stops), or, in templates without one, where the next message begins.

Each span is checked: it must hold the message's content, and the text between two spans
the messages between them. A template that rewrites earlier turns so that a span cannot be
found is refused with the reason; one whose generation prompt differs from the training
text (for example by an opened thinking block) is masked from the point where both agree,
and the difference is reported. Tokens are those of the whole text; a token is trained if
it overlaps a span.
"""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxlora.base import check_tokens
from mlxlora.config import DataConfig
from mlxlora.data.formats import Message, Record
from mlxlora.errors import DataError

MARK = "\ue000\ue001"  # private characters: no template writes or drops them
Span = tuple[int, int]  # [start, end) in characters of the rendered text


@dataclass(frozen=True)
class Example:
    """One row as the model sees it."""

    row: int  # 0-based row in its file
    tokens: np.ndarray  # (n,) int32
    mask: np.ndarray  # (n,) bool: the token is a target
    truncated: bool = False

    @property
    def supervised(self) -> int:
        """Tokens that are trained. The first token of a row is never predicted."""
        return int(self.mask[1:].sum())

    @property
    def size(self) -> tuple[int, int]:
        """(predictions, how many of them are trained)."""
        return len(self.tokens) - 1, self.supervised


class Renderer:
    """Renders records with one tokenizer. Raises DataError for what cannot be masked right.

    .notes collects, once each, what a user should know about the template.
    """

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.max_length = data.max_length
        self.mask = data.mask
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._plain = getattr(tokenizer, "_tokenizer", tokenizer)  # Hugging Face's own
        self._eos = tuple(
            text
            for text in (self._plain.decode([i]) for i in sorted(tokenizer.eos_token_ids))
            if text
        )

    def __call__(self, record: Record) -> Example:
        with self._lock:  # rows are also rendered ahead in another thread
            return self._render(record)

    def _render(self, record: Record) -> Example:
        if record.kind == "text":
            tokens, mask = self._render_text(record.text)
        elif self.tokenizer.has_chat_template:
            tokens, mask = self._render_chat(record)
        elif record.kind == "completion":
            tokens, mask = self._render_pair(record)
        else:
            raise DataError(
                "this base's tokenizer has no chat template, so chat rows cannot be rendered; "
                'use an instruct model, or rows of {"prompt", "completion"} or {"text"}'
            )
        check_tokens(self.tokenizer, tokens)
        cut = self.max_length + 1  # n tokens give n - 1 predictions
        return Example(record.row, tokens[:cut], mask[:cut], truncated=len(tokens) > cut)

    def _render_text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Plain text, every token trained, closed by an end-of-sequence token."""
        tokens = self._plain.encode(text)
        if not tokens or tokens[-1] not in self.tokenizer.eos_token_ids:
            tokens.append(self.tokenizer.eos_token_id)
        return np.asarray(tokens, np.int32), np.ones(len(tokens), bool)

    def _render_pair(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Without a template: the prompt's tokens, the completion's, end-of-sequence."""
        *before, answer = (message["content"] for message in record.messages)
        prompt = self._plain.encode("\n\n".join(before))
        completion = self._plain.encode(answer, add_special_tokens=False)
        completion.append(self.tokenizer.eos_token_id)
        mask = np.zeros(len(prompt) + len(completion), bool)
        mask[0 if self.mask == "all" else len(prompt) :] = True
        return np.asarray(prompt + completion, np.int32), mask

    def _render_chat(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        text = self.template(record.messages, record.tools)
        if self.mask == "all":
            spans = [(0, len(text))]
        else:
            spans = self._assistant_spans(record, text)
            if self.mask == "completion":
                spans = spans[-1:]
        return self._tokenize(text, spans)

    def template(
        self,
        messages: tuple[Message, ...] | list[Message],
        tools: Any = None,
        prompt: bool = False,
    ) -> str:
        """The chat template's text; prompt=True adds the opening of an assistant turn."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            )
        except Exception as error:  # templates raise through jinja whatever they like
            roles = ", ".join(message["role"] for message in messages) or "no messages"
            raise DataError(
                f"the chat template refuses this conversation ({roles[:200]}): {str(error)[:400]}"
            ) from error

    # --- where the assistant speaks ------------------------------------------------------

    def _assistant_spans(self, record: Record, text: str) -> list[Span]:
        messages, tools = record.messages, record.tools
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        starts = [self._start(messages, tools, i, text) for i in turns]
        spans = []
        for number, (turn, start) in enumerate(zip(turns, starts, strict=True)):
            limit = starts[number + 1] if number + 1 < len(turns) else len(text)
            spans.append((start, self._end(messages, tools, turn, text, start, limit)))
        whole = self._verify(messages, turns, spans, text)
        return [span for span, kept in zip(spans, whole, strict=True) if kept]

    def _start(self, messages: tuple[Message, ...], tools: Any, turn: int, text: str) -> int:
        """Where this turn's generated text begins in the whole text."""
        if turn == 0:  # many templates cannot render no messages at all
            return self._start_of_first(messages, tools, text)
        opened = self.template(messages[:turn], tools, prompt=True)
        if text.startswith(opened):
            return len(opened)
        before = self.template(messages[:turn], tools)
        if not text.startswith(before):
            raise DataError(
                f"the chat template renders messages 1-{turn} differently once more follow "
                f"(near {_first_difference(before, text)}), so what is trained would not be "
                "what is generated; split such rows so that each ends with the turn to train"
            )
        agreed = len(os.path.commonprefix([opened, text]))
        self._note(
            f"the chat template opens an assistant turn with {opened[len(before) :]!r} when it "
            f"generates, but turns in the data do not go on with {opened[agreed:]!r}; "
            "they are trained from where both agree"
        )
        return agreed

    def _start_of_first(self, messages: tuple[Message, ...], tools: Any, text: str) -> int:
        marked = [{**messages[0], "content": MARK}, *messages[1:]]
        before, found, _ = self.template(marked, tools).partition(MARK)
        if not found or not text.startswith(before):
            raise DataError(_lost(messages[0], "at the start"))
        return len(before)

    def _end(
        self,
        messages: tuple[Message, ...],
        tools: Any,
        turn: int,
        text: str,
        start: int,
        limit: int,
    ) -> int:
        """Just after the turn's end-of-sequence token, or where the turn's text ends."""
        content = messages[turn]["content"].strip()
        place = text.find(content, start, limit)
        after = place + len(content) if place >= 0 else start
        ends = [
            place + len(eos) for eos in self._eos if (place := text.find(eos, after, limit)) >= 0
        ]
        if ends:
            return min(ends)
        self._note(
            "the chat template ends the assistant's turns with no end-of-sequence token of this "
            f"tokenizer ({', '.join(self._eos) or 'it has none'}), so the tuned model will not "
            "learn where to stop"
        )
        if turn == len(messages) - 1:
            return len(text)
        through = self.template(messages[: turn + 1], tools)
        if text.startswith(through) and start < len(through) <= limit:
            return len(through)
        raise DataError(
            f"the chat template closes message {turn + 1} with no end-of-sequence token "
            f"({', '.join(self._eos) or 'none known'}) and renders it differently when more "
            "follow, so its end cannot be found; split the row after that message"
        )

    def _verify(
        self, messages: tuple[Message, ...], turns: list[int], spans: list[Span], text: str
    ) -> list[bool]:
        """Each span holds its message's words, and the gap before it the other messages'.

        Returns, per turn, whether its thinking is there too. Templates drop the thinking of
        earlier turns; training such a turn would teach the model not to think.
        """
        position, first, whole = 0, 0, []
        for turn, (start, end) in zip(turns, spans, strict=True):
            gap, place = text[position:start], 0
            for message in messages[first:turn]:
                words = message["content"].strip()
                found = gap.find(words, place)
                if found < 0 and message["role"] in ("user", "system"):
                    raise DataError(_lost(message, "before the assistant's turn"))
                place = max(place, found + len(words))
            thinking, answer = _thinking_of(messages[turn])
            if answer not in text[start:end]:
                raise DataError(_lost(messages[turn], "in the span to be trained"))
            whole.append(thinking in text[start:end])
            position, first = end, turn + 1
        if not all(whole):
            self._note(
                "the chat template drops the thinking of earlier turns; those turns are not "
                "trained, only turns whose thinking is shown"
            )
        return whole

    def _tokenize(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        if not self._plain.is_fast:
            return self._tokenize_pieces(text, spans)
        encoded = self._plain(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        mask = np.zeros(len(offsets), bool)
        for start, end in spans:
            mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return np.asarray(encoded["input_ids"], np.int32), mask

    def _tokenize_pieces(self, text: str, spans: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """For tokenizers without offsets: piece by piece, if that gives the same tokens."""
        tokens: list[int] = []
        mask: list[bool] = []
        for start, end, trained in _pieces(spans, len(text)):
            piece = self._plain.encode(text[start:end], add_special_tokens=False)
            tokens += piece
            mask += [trained] * len(piece)
        if tokens != self._plain.encode(text, add_special_tokens=False):
            raise DataError(
                "this tokenizer reports no character offsets and splits the text differently "
                "in pieces, so the trained tokens cannot be told; use --mask all"
            )
        return np.asarray(tokens, np.int32), np.asarray(mask, bool)

    def _note(self, text: str) -> None:
        if text not in self.notes and len(self.notes) < 10:
            self.notes.append(text)


def _thinking_of(message: Message) -> tuple[str, str]:
    """(the thinking, the answer) of an assistant's message, either may be empty."""
    before, closed, after = message["content"].rpartition("</think>")
    thinking = before.rpartition("<think>")[2] if closed else ""
    apart = message.get("reasoning_content")
    return (thinking or (apart if isinstance(apart, str) else "")).strip(), after.strip()


def _pieces(spans: list[Span], length: int) -> Iterator[tuple[int, int, bool]]:
    position = 0
    for start, end in spans:
        yield position, start, False
        yield start, end, True
        position = end
    yield position, length, False


def _first_difference(a: str, b: str) -> str:
    place = len(os.path.commonprefix([a, b]))
    return repr(a[max(0, place - 15) : place + 15])


def _lost(message: Message, where: str) -> str:
    return (
        f"the chat template does not show the {message['role']} message "
        f"{message['content'][:40]!r} {where}, so its mask cannot be verified"
    )
