"""Whether the tuned model will be asked as it was trained: prompt, ending, beginning.

At inference the prompt is the conversation before a turn, with the template's generation prompt.
It must be what stands before the trained tokens in the row, as text and as tokens: a tokenizer
may join the last character of the prompt with the first of the answer. Checked on rows spread
over the data; render.py checks every row's spans when it is trained.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlxlora.config import DataConfig
from mlxlora.data.formats import Record
from mlxlora.data.inspect.lengths import WHOLE
from mlxlora.data.render import Example, Renderer
from mlxlora.errors import DataError

CHECKED = 200  # rows
TAIL = 4  # tokens at the end of a row among which the end of sequence is looked for
SHOWN = 60  # characters


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, how it stands, and what mends it."""

    state: Literal["pass", "warn", "fail"]
    name: str
    found: str
    remedy: str = ""


def check_template(
    tokenizer: Any, data: DataConfig, records: Sequence[tuple[str, Record]]
) -> tuple[Finding, ...]:
    """Findings about rows that can be rendered, each with its file:line."""
    renderer = Renderer(tokenizer, replace(data, max_length=WHOLE))
    examples: list[tuple[str, Record, Example]] = []
    for where, record in records:
        try:
            examples.append((where, record, renderer(record)))
        except DataError:  # counted and shown as refused
            continue
    if not examples:
        return ()
    chats = [one for one in examples if one[1].kind != "text"]
    found = [_ending(tokenizer, data, examples), _beginning(tokenizer, examples)]
    if chats and tokenizer.has_chat_template:
        found.insert(0, _prompt(renderer, chats))
    elif not chats and tokenizer.has_chat_template:
        found.insert(0, PLAIN_TEXT)
    return tuple(finding for finding in found if finding is not None)


PLAIN_TEXT = Finding(
    "warn",
    "prompt",
    "rows of plain text are trained as they are, without the chat template, in which chat and "
    "serve ask",
    "ask with mlxlora chat --raw; or make rows of "
    '{"prompt", "completion"}, which the template renders',
)


def _prompt(renderer: Renderer, rows: Sequence[tuple[str, Record, Example]]) -> Finding:
    differences = []
    for where, record, example in rows:
        difference = _difference(renderer, record, example)
        if difference:
            differences.append((where, difference))
    if not differences:
        return Finding(
            "pass", "prompt", f"what is asked is what stands before the trained turn ({_of(rows)})"
        )
    where, difference = differences[0]
    return Finding(
        "warn",
        "prompt",
        f"in {len(differences)} of {_of(rows)} the prompt at inference is not what stands before "
        f"the trained turn; at {where} {difference}",
        "the model is trained from where both agree; write the answers as the template "
        "generates them, or use another template (chat_template.jinja of the model)",
    )


def _difference(renderer: Renderer, record: Record, example: Example) -> str:
    """How the prompt of the last assistant turn differs from the row, or ''."""
    messages, tools = record.messages, record.tools
    turn = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if turn == 0:
        return ""
    asked = renderer.template(messages[:turn], tools, prompt=True)
    whole = renderer.template(messages, tools)
    if not whole.startswith(asked):
        agreed = len(os.path.commonprefix([asked, whole]))
        return (
            f"the prompt goes on with {asked[agreed:][:SHOWN]!r}, "
            f"the row with {whole[agreed:][:SHOWN]!r}"
        )
    tokens = renderer.tokenizer.apply_chat_template(
        list(messages[:turn]),
        tools=list(tools) if tools else None,
        add_generation_prompt=True,
        tokenize=True,
    )
    row = example.tokens.tolist()
    agreed = len(os.path.commonprefix([list(tokens), row]))
    if agreed == len(tokens):
        return ""
    decode = renderer.tokenizer.decode
    return (
        f"token {agreed + 1} of the prompt is {decode([tokens[agreed]])!r}, "
        f"that of the row {decode([row[agreed]])!r}"
    )


def _ending(
    tokenizer: Any, data: DataConfig, rows: Sequence[tuple[str, Record, Example]]
) -> Finding:
    """Whether the model is trained to stop: without, answers run on."""
    ends = set(tokenizer.eos_token_ids)
    last = TAIL if data.mask == "all" else 1
    without = [
        where
        for where, _, example in rows
        if example.supervised and not ends & set(example.tokens[example.mask][-last:].tolist())
    ]
    names = ", ".join(repr(tokenizer.decode([i])) for i in sorted(ends)[:3])
    if not without:
        return Finding("pass", "ending", f"rows end with a trained end of sequence ({names})")
    return Finding(
        "warn",
        "ending",
        f"{len(without)} of {_of(rows)} train no end of sequence ({names}), first {without[0]}: "
        "the tuned model will not learn where to stop",
        "the chat template must close the assistant's turn with one of these tokens; use the "
        "model's own template, or name its closing token as eos_token_id in config.json",
    )


def _beginning(tokenizer: Any, rows: Sequence[tuple[str, Record, Example]]) -> Finding | None:
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None:
        return None
    doubled = [where for where, _, e in rows if e.tokens[:2].tolist() == [begin, begin]]
    name = repr(tokenizer.decode([begin]))
    if not doubled:
        return Finding("pass", "beginning", f"no row begins with {name} twice")
    return Finding(
        "warn",
        "beginning",
        f"{len(doubled)} of {_of(rows)} begin with {name} twice, first {doubled[0]}",
        f"take {name} out of the rows (or out of the chat template): the tokenizer adds it",
    )


def _of(rows: Sequence[Any]) -> str:
    return f"{len(rows)} row" + "s" * (len(rows) != 1)
