"""Whether a TEMPLATE renders as the chat template does: conversations rendered both ways.

The Go side is what Ollama does with a chat (template/template.go): a Modelfile's system message
goes in front if there is none, neighbours of one role are joined, and thinking comes apart from
the words of an answer. Both sides are without the BOS that the runtime adds itself.
"""

from dataclasses import dataclass, field
from typing import Any

from mlxlora.errors import ExportError
from mlxlora.export.ollama.template import GoTemplate, GoTemplateError
from mlxlora.export.ollama.turns import Prober, Refused

Messages = list[dict[str, str]]
PLAINEST = "one turn"
REMEDY = (
    "export --format gguf instead: newer versions of Ollama run the chat template that is in it"
)


@dataclass
class Compared:
    """What came of rendering conversations both ways."""

    equal: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # by the chat template itself
    first: str = ""  # difference


def rendered(text: str, messages: Messages, system: str = "", think: bool | None = None) -> str:
    """The prompt that Ollama makes of a chat. system: the Modelfile's. think: None for unsaid."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    joined: list[dict[str, Any]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["role"]:
            joined[-1]["Content"] += "\n\n" + message["content"]
            continue
        thinking = message.get("thinking", "")
        role, content = message["role"], message["content"]
        joined.append({"Role": role, "Content": content, "Thinking": thinking})
    told = [message["content"] for message in messages if message["role"] == "system"]
    data = {"System": "\n\n".join(told), "Messages": joined, "Response": "", "ThinkLevel": ""}
    return GoTemplate(text).execute({**data, "Think": bool(think), "IsThinkSet": think is not None})


def compare(prober: Prober, text: str, system: str = "") -> Compared:
    """Render conversations with the chat template and with text, a TEMPLATE.

    Raises ExportError if the plainest of them, one question, differs.
    """
    done = Compared()
    for name, (messages, options) in conversations().items():
        try:
            expected = prober.render(_for_jinja(messages), **options)
        except Refused:
            done.refused.append(name)
            continue
        try:
            got = rendered(text, messages, system, options.get("enable_thinking"))
        except (GoTemplateError, RecursionError) as error:
            got = f"({error})"
        if got == expected:
            done.equal.append(name)
            continue
        done.different.append(name)
        done.first = done.first or f"{name}: {_apart(expected, got)}"
    if PLAINEST not in done.equal:
        raise ExportError(
            "the chat template cannot be said as an Ollama TEMPLATE: even one question comes out "
            f"different, {done.first or 'refused'}; {REMEDY}"
        )
    return done


def _for_jinja(messages: Messages) -> Messages:
    return [
        {"reasoning_content" if key == "thinking" else key: value for key, value in one.items()}
        for one in messages
    ]


def _apart(expected: str, got: str) -> str:
    place = next((n for n, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    place = min(len(expected), len(got)) if place is None else place
    around = slice(max(0, place - 20), place + 20)
    return f"{expected[around]!r} by the chat template, {got[around]!r} by the TEMPLATE"


def conversations() -> dict[str, tuple[Messages, dict[str, Any]]]:
    """Names of conversations -> (their messages, the chat template's options)."""
    kinds = {
        "": ("What is a fjord?", "A flooded valley.", "And a fell?", "A hill.", "Thanks!"),
        ", space around": ("  Hi \n", " \n Hello.\n\n", "\tBye\t\r\n", " \nBye. ", "\n\nHm \n"),
        ", braces": ("{{ .System }}", "{% if x %}}}", "{{ '{{' }}", '"""\n{{{', "{{{{"),
        ", unicode": (
            "Grüße 🦊 \u00a0.",
            "日本語 ｜▁｜",
            "e\u0301\u200b",
            "ﷺ \ufeff!",
            "\U0001f600",
        ),
        ", lines": ("a\n\nb\n c", 'say "x"\n\\n', "1\n2\n", "<b>\n</b>", "`x`\n\n\n`y`"),
    }
    found: dict[str, tuple[Messages, dict[str, Any]]] = {}
    for kind, (ask, answer, again, more, last) in kinds.items():
        one = [_said("user", ask)]
        two = [*one, _said("assistant", answer), _said("user", again)]
        three = [*two, _said("assistant", more), _said("user", last)]
        system = _said("system", more)
        for count, turns in {"one turn": one, "two turns": two, "three turns": three}.items():
            found[count + kind] = turns, {}
            found[f"{count}{kind}, a system message"] = [system, *turns], {}
    one = [_said("user", "Hi.")]
    answered = [*one, _said("assistant", "Yes?")]
    later = [*answered, _said("system", "Be brief."), _said("user", "Why?")]
    thought = [*one, {**_said("assistant", "Yes?"), "thinking": "A greeting."}]
    go_on = {"continue_final_message": True}
    found["a system message later on"] = later, {}
    found["an answer to go on with"] = answered, go_on
    found["an answer with its thinking, to go on with"] = thought, go_on
    found["an earlier answer with its thinking"] = [*thought, _said("user", "Go on.")], {}
    asked = [*answered, _said("user", "Who?")]
    found["thinking turned off, two turns"] = asked, {"enable_thinking": False}
    found["thinking turned on"] = one, {"enable_thinking": True}
    found["thinking turned off"] = one, {"enable_thinking": False}
    return found


def _said(role: str, words: str) -> dict[str, str]:
    return {"role": role, "content": words}
