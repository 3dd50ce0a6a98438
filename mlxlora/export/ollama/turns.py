"""A chat template's structure, found by rendering it: what stands around each role's words.

Conversations of marked words are rendered and the text between the marks is read. Nothing is
known of any model; what cannot be told as words between fixed texts is not seen here, so whoever
uses a structure compares it with the template (written.py).
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlxlora.errors import ExportError

SPACE = " \t\n\r\v\f"
ROLES = {"s": "system", "u": "user", "a": "assistant"}
_TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {}}}


class Refused(ExportError):
    """The template does not take a conversation, or does not show its words once, in order."""


@dataclass(frozen=True)
class Strip:
    """The characters that are taken off both ends of words."""

    left: str = ""
    right: str = ""


@dataclass(frozen=True)
class Turn:
    before: str
    after: str
    strip: Strip = Strip()


@dataclass(frozen=True)
class System:
    """Where system messages go: a turn of their own, or into the first or last user's turn."""

    kind: Literal["own", "first", "last"]
    before: str  # what stands before it; of kind "own", from the very start
    after: str  # up to the user's turn or, merged into that, up to the user's words
    strip: Strip
    user_strip: Strip  # of the user's words that follow
    own: str | None = None  # what opens such a turn wherever it stands; None: only at the start
    default: str = ""  # that stands there when there is none


@dataclass(frozen=True)
class Thinking:
    """What stands around an answer's thinking."""

    before: str  # in place of assistant.before
    after: str


@dataclass
class Turns:
    """A conversation's text is start, the turns, and the prompt for the answer."""

    start: str  # when there is no system message
    first: str  # before the first user's words, mostly user.before
    user: Turn
    assistant: Turn
    prompt: str
    prompt_off: str  # with thinking turned off
    continued: str  # assistant.before of an answer that is to go on
    system: System | None = None
    thinking: Thinking | None = None
    notes: list[str] = field(default_factory=list)


class Prober:
    """Renders conversations with one tokenizer, without the BOS that the runtime adds itself."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos = added_bos(tokenizer)

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """As at inference: with the prompt for the answer unless told otherwise."""
        if not options.get("continue_final_message"):
            options.setdefault("add_generation_prompt", True)
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # templates raise through jinja whatever they like
            raise Refused(f"the chat template refuses it: {str(error)[:200]}") from error
        return text.removeprefix(self.bos)

    def gaps(self, roles: str, words: dict[int, str] | None = None, **options: Any) -> list[str]:
        """The texts before, between and after the words of a conversation, e.g. "sua".

        words: in place of a message's mark, words that hold it. Raises Refused.
        """
        order, texts = self.pieces(roles, words, **options)
        if order != list(range(len(roles))):
            raise Refused("the chat template changes the order of messages")
        return texts

    def pieces(
        self, roles: str, words: dict[int, str] | None = None, **options: Any
    ) -> tuple[list[int], list[str]]:
        """(the order in which the messages are shown, the texts around them)."""
        shown = [(words or {}).get(place, mark(place)) for place in range(len(roles))]
        messages = [{"role": ROLES[r], "content": w} for r, w in zip(roles, shown, strict=True)]
        return split(self.render(messages, **options), len(roles))

    def strip(self, roles: str, place: int) -> Strip:
        """What is taken off the words of one message of a conversation."""
        plain = self.gaps(roles)
        kept = mark(place)
        left = (c for c in SPACE if self.gaps(roles, {place: c + kept})[place] == plain[place])
        after = place + 1
        right = (c for c in SPACE if self.gaps(roles, {place: kept + c})[after] == plain[after])
        return Strip("".join(left), "".join(right))


def mark(place: int) -> str:
    """Private characters around a number: no template writes or drops them."""
    return f"\ue000{place}\ue001"


def split(text: str, count: int) -> tuple[list[int], list[str]]:
    """(the order of the marks in text, the texts around them). Raises Refused."""
    for place in range(count):
        if text.count(mark(place)) != 1:
            raise Refused("the chat template does not show every message once, as it is")
    order = sorted(range(count), key=lambda place: text.index(mark(place)))
    texts = []
    for place in order:
        before, _, text = text.partition(mark(place))
        texts.append(before)
    return order, [*texts, text]


def added_bos(tokenizer: Any) -> str:
    """The text of the token that the tokenizer puts before every text by itself; mostly ""."""
    plain = getattr(tokenizer, "_tokenizer", tokenizer)
    bare, tokens = plain.encode("a", add_special_tokens=False), plain.encode("a")
    added = len(tokens) > len(bare) and tokens[0] != bare[0]
    return str(plain.decode(tokens[:1])) if added else ""


def find(prober: Prober) -> Turns:
    """The structure of the tokenizer's chat template. Raises Refused if there is none to see."""
    turns = _plain(prober)
    turns.system = _system(prober, turns)
    _think(prober, turns)
    _note(prober, turns)
    return turns


def _plain(prober: Prober) -> Turns:
    """The turns of user and assistant."""
    opened, asked = prober.gaps("u")
    closed = prober.gaps("u", add_generation_prompt=False)[1]
    notes = []
    try:
        _, answer, again, *_ = prober.gaps("uauau")
        continued, ended = prober.gaps("ua", add_generation_prompt=False)[1:]
    except Refused as error:
        notes.append(f"only conversations of one turn are exact: {error}")
        answer = continued = asked
        again, ended = opened, ""
    after = os.path.commonprefix([closed, asked, answer])
    before = again[len(close := os.path.commonprefix([ended, again])) :]
    fits = opened.endswith(before)
    return Turns(
        start=opened[: len(opened) - len(before)] if fits else "",
        first=before if fits else opened,
        user=Turn(before, after, prober.strip("u", 0)),
        assistant=Turn(answer[len(after) :], close, _strip_of_answers(prober)),
        prompt=asked[len(after) :],
        prompt_off=asked[len(after) :],
        continued=continued[len(after) :],
        notes=notes,
    )


def _strip_of_answers(prober: Prober) -> Strip:
    try:
        return prober.strip("uau", 1)
    except Refused:
        return Strip()


def _system(prober: Prober, turns: Turns) -> System | None:
    """Where system messages go; turns.start and turns.first fit it then."""
    try:
        before, after, _ = prober.gaps("su")
        strips = prober.strip("su", 0), prober.strip("su", 1)
        order, texts = prober.pieces("suauau")
    except Refused as error:
        turns.notes.append(f"system messages are left out: {error}")
        return None
    opened = turns.start + turns.first
    if order == [1, 2, 3, 4, 0, 5]:
        before, after = texts[4][len(turns.assistant.after) :], texts[5]
        return System("last", before, after, *strips)
    default = _default(prober, before, after, opened)
    own = turns.user.before
    if own and after.endswith(own) and turns.first == own:
        after = after[: -len(own)]
        system = System("own", before, after, *strips, default=default)
        return replace(system, own=_anywhere(prober, turns, system))
    if not before.startswith(turns.start):
        turns.start, turns.first = "", opened
    return System("first", before[len(turns.start) :], after, *strips, default=default)


def _default(prober: Prober, before: str, after: str, opened: str) -> str:
    """The text that stands in place of the system's words when there are none."""
    inside = opened.startswith(before) and opened.endswith(after)
    text = opened[len(before) : len(opened) - len(after)] if inside else ""
    if not text:
        return ""
    user = {"role": "user", "content": mark(1)}
    same = prober.render([{"role": "system", "content": text}, user]) == prober.render([user])
    return text if same else ""


def _anywhere(prober: Prober, turns: Turns, system: System) -> str | None:
    """What opens a system's turn in the middle of a conversation; None if it is not the same."""
    try:
        _, _, opens, closes, _ = prober.gaps("uasu")
    except Refused:
        return None
    own = opens.removeprefix(turns.assistant.after)
    start = system.before.removesuffix(own)
    same = (
        opens.startswith(turns.assistant.after)
        and system.before.endswith(own)
        and closes == system.after + turns.user.before
        and turns.start.startswith(start)
    )
    return own if same else None


def _think(prober: Prober, turns: Turns) -> None:
    """How thinking is turned off, and what stands around it."""
    opened, asked = prober.gaps("u")
    for wish in (False, True):  # what mlx-lm calls it is told to the template by its own name
        try:
            start, other = prober.gaps("u", enable_thinking=wish)
        except Refused:
            break
        if start != opened or not other.startswith(turns.user.after):
            break
        if wish and other != asked:  # by default it is off: then that is how it stays
            turns.prompt_off = turns.prompt
        elif not wish:
            turns.prompt_off = other[len(turns.user.after) :]
    turns.thinking = _tags(prober, turns)


def _tags(prober: Prober, turns: Turns) -> Thinking | None:
    messages = [
        {"role": "user", "content": mark(0)},
        {"role": "assistant", "reasoning_content": mark(1), "content": mark(2)},
    ]
    try:
        order, texts = split(prober.render(messages, add_generation_prompt=False), 3)
        if order == [0, 1, 2] and texts[1].startswith(turns.user.after):
            return Thinking(texts[1].removeprefix(turns.user.after), texts[2])
    except Refused:
        pass
    opens = getattr(prober.tokenizer, "think_start", None)
    closes = getattr(prober.tokenizer, "think_end", None)
    rest = turns.prompt.removeprefix(turns.assistant.before)
    if opens and closes and rest.strip() == opens:  # the prompt has the answer begin with it
        line = rest[len(rest.rstrip()) :]
        return Thinking(turns.prompt, f"{line}{closes}{line * 2}")
    return None


def _note(prober: Prober, turns: Turns) -> None:
    """What of the template no structure holds."""
    messages = [{"role": "user", "content": "hi"}]
    plain = prober.render(messages)
    if _outcome(prober, messages, strftime_now="") != plain:
        turns.notes.append("the chat template writes the date, which stays that of the export")
    if _outcome(prober, messages, tools=[_TOOL]) not in (plain, ""):
        turns.notes.append(
            "tools are not in this TEMPLATE; an Ollama that sees them in the GGUF's own chat "
            "template runs that one instead"
        )
    whole = prober.tokenizer.apply_chat_template(messages, tokenize=False)
    if not str(whole).startswith(prober.bos):
        turns.notes.append(f"Ollama puts {prober.bos} first, which the chat template does not")


def _outcome(prober: Prober, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text, "" if it is refused."""
    try:
        return prober.render(messages, **options)
    except Refused:
        return ""
