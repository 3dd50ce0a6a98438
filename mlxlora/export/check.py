"""The same prompts through base + adapter, what was written, and the program that it is for.

First the prompts' token ids: where those differ, nothing after them means anything. Then greedy
answers, token by token. What was written is asked in MLX too, so that it shows whether a
difference comes from the weights or from the program.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlxlora.base import Base
from mlxlora.data.formats import Record
from mlxlora.export.speakers import Speaker
from mlxlora.export.trial import own_rows
from mlxlora.lora.adapter import Adapter

LENGTH = 32  # tokens of an answer
LONGEST = 512  # tokens of a prompt; longer ones are not asked
OWN = 4  # prompts from the rows that the adapter's run kept for validation
# What tokenizers of other programs get wrong.
PROMPTS = (
    "What is the capital of France?",
    "  Two spaces before, and one after. ",
    "def f(x):\n\tif x > 10_000:\n\t\treturn x ** 2\n\n\n# three lines",
    "1234567890 + 3.14159 = ?  10,000.00 0x1F 1e-5",
    "naïve café, Straße, ÅÄÖ, Ελληνικά, Русский, עברית, العربية",
    "今日は良い天気ですね。你好,世界!안녕하세요",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 ☺️ — “quotes” … ½ ™",
    "I'll say: it's WE'RE you've\r\nnew\tline\u00a0non-breaking",
)


@dataclass(frozen=True)
class Compared:
    """How one program's prompts and answers stand to those of base + adapter."""

    name: str
    prompts: int  # asked
    same_prompts: int  # whose token ids are the same
    same_answers: int
    differing: tuple[str, ...] = ()  # prompts whose token ids differ
    example: tuple[str, str, str] | None = None  # prompt, answer and other answer, the first


def compare(
    first: Speaker,
    others: Sequence[Callable[[], Speaker]],
    prompts: Sequence[tuple[str, bool]],
    length: int = LENGTH,
) -> Iterator[Compared]:
    """Ask all the same (text, raw) prompts. Each program is opened when its turn comes.

    All are given the token ids of the first, so that answers compare even where prompts do not.
    """
    given = [(first.tokens(text, raw), text, raw) for text, raw in prompts]
    prompts = [(text, raw) for ids, text, raw in given if 0 < len(ids) <= LONGEST]
    tokens = [ids for ids, _, _ in given if 0 < len(ids) <= LONGEST]
    answers = [first.answer(ids, length) for ids in tokens]
    for opened in others:
        other = opened()
        same = [
            ours == other.tokens(text, raw)
            for ours, (text, raw) in zip(tokens, prompts, strict=True)
        ]
        said = [other.answer(ids, length) for ids in tokens]
        unlike = [n for n, answer in enumerate(said) if answer != answers[n]]
        yield Compared(
            other.name,
            len(prompts),
            sum(same),
            len(prompts) - len(unlike),
            tuple(text for (text, _), ok in zip(prompts, same, strict=True) if not ok),
            next(
                ((prompts[n][0], first.text(answers[n]), first.text(said[n])) for n in unlike), None
            ),
        )


def prompts_for(base: Base, adapter: Adapter | None) -> list[tuple[str, bool]]:
    """(text, raw) of the bundled prompts, and of some that the adapter's run kept for itself.

    Each is rendered by the base's chat template, unless it has none or the adapter was trained
    on plain text.
    """
    asked: list[list[dict[str, Any]]] = [[{"role": "user", "content": p}] for p in PROMPTS]
    plain = not base.tokenizer.has_chat_template
    found = own_rows(adapter, "valid") if adapter is not None else None
    if found is not None:
        rows = found[0]
        for record in (rows[n] for n in range(min(OWN, len(rows)))):
            plain = plain or record.kind == "text"
            asked.append(_question(record))
    if plain:
        return [(turns[-1]["content"], True) for turns in asked if turns]
    template = base.tokenizer.apply_chat_template
    return [
        (str(template(turns, add_generation_prompt=True, tokenize=False)), False) for turns in asked
    ]


def _question(record: Record) -> list[dict[str, Any]]:
    """The turns before the row's last answer; of a text, its first half."""
    if record.kind == "text":
        return [{"role": "user", "content": record.text[: len(record.text) // 2]}]
    turns = [dict(message) for message in record.messages]
    return turns[: max(n for n, turn in enumerate(turns) if turn["role"] == "assistant")]
