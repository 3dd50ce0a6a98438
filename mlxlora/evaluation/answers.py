"""Greedy answers to the rows' last assistant turns, each scored as it comes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mlxlora.base import Base
from mlxlora.data.formats import Record
from mlxlora.data.records import Rows
from mlxlora.errors import DataError
from mlxlora.evaluation.metrics import Metric
from mlxlora.generate import answer_all, chat_tokens, prompt_tokens


@dataclass(frozen=True)
class Question:
    """What a row asks, and its own answer."""

    row: int  # 0-based row in its file
    prompt: str
    wanted: str
    tokens: list[int]  # of the whole conversation up to the answer


@dataclass(frozen=True)
class Answer:
    """One generated answer beside the row's own."""

    prompt: str
    wanted: str
    got: str
    row: int = 0  # 0-based row in its file
    scores: Mapping[str, float] = field(default_factory=dict)  # by metric

    @property
    def exact(self) -> bool:
        return self.wanted.strip() == self.got.strip()


def questions(
    base: Base, rows: Rows, metrics: Sequence[Metric], skip_refused: bool
) -> list[Question]:
    """The rows' questions; rows that the template refuses are left out if they may be.

    Raises DataError with file:line for rows that cannot be asked or scored.
    """
    asked = []
    for record in rows:
        try:
            question = _question(base, record)
        except DataError as error:
            if skip_refused and record.kind != "text":
                continue
            raise DataError(f"{rows.where(record)}: {error}") from error
        for metric in metrics:
            fault = metric.refuses(question.wanted)
            if fault is not None:
                raise DataError(f"{rows.where(record)}: --metric {metric.name}: {fault}")
        asked.append(question)
    return asked


def answers(
    base: Base,
    rows: Rows,
    asked: Sequence[Question],
    metrics: Sequence[Metric],
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> tuple[Answer, ...]:
    """The model's greedy answers, in the order of the questions.

    Raises DataError with file:line when a metric cannot score one.
    """
    found: dict[int, Answer] = {}
    prompts = [question.tokens for question in asked]
    for number, got in answer_all(base.model, base.tokenizer, prompts, max_tokens):
        question = asked[number]
        prompt, wanted = question.prompt, question.wanted
        try:
            scores = {metric.name: metric.score(prompt, wanted, got) for metric in metrics}
        except DataError as error:
            raise DataError(f"{rows.file.where(question.row)}: {error}") from error
        found[number] = Answer(prompt, wanted, got, question.row, scores)
        progress(len(found), len(asked))
    return tuple(found[number] for number in range(len(asked)))


def last_turn(record: Record) -> int:
    """The message that is to be answered anew: the assistant's last."""
    return max(i for i, m in enumerate(record.messages) if m["role"] == "assistant")


def texts(record: Record) -> tuple[str | None, str]:
    """(what is asked, the row's own answer); of plain text, (None, all of it)."""
    if record.kind == "text":
        return None, record.text
    last = last_turn(record)
    asked = record.messages[last - 1]["content"] if last else ""
    return asked, record.messages[last]["content"]


def _question(base: Base, record: Record) -> Question:
    asked, wanted = texts(record)
    if asked is None:
        raise DataError(
            "--generate and --metric need rows with an answer; rows of {'text'} have none"
        )
    before = record.messages[: last_turn(record)]
    if not base.tokenizer.has_chat_template:
        tokens = prompt_tokens(base.tokenizer, asked, raw=True)
    else:
        tokens = chat_tokens(base.tokenizer, before, record.tools and list(record.tools))
    return Question(record.row, asked, wanted, tokens)
