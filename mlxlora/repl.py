"""The interactive chat: one prompt after another, and a few commands."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mlxlora.chat import Conversation
from mlxlora.console import Screen
from mlxlora.errors import ConfigError, MlxLoraError
from mlxlora.lora.adapter import Adapter
from mlxlora.spoken import speak

HELP = """\
/reset             forget the conversation
/system TEXT       set the system prompt (nothing: remove it) and forget the conversation
/adapter NAME      switch to another adapter, by name or directory; the conversation stays
/adapter none      talk to the bare base
/adapter           which there are, and which is in use
/compare A B ...   let several answer each prompt, the first one's answer staying; none is the base
/compare           let one answer again
/plain             show answers as they are written, or Markdown again
/save FILE         write the conversation as a row of JSONL that can be trained on
/load FILE         go on with one that was saved
/help              this list
/quit              leave (so does Ctrl-D); Ctrl-C stops an answer; a line ending in \\ goes on"""
NONE = ("none", "base")  # names of the bare base, unless an adapter has them


def answer_once(conversation: Conversation, prompt: str, screen: Screen) -> None:
    """Print one answer (and, with --json, the result)."""
    text = screen.stream(conversation.say(prompt))
    screen.result({"prompt": prompt, "text": text})


def talk(
    conversation: Conversation, screen: Screen, *, plain: bool = False, force: bool = False
) -> None:
    """Read, answer, repeat, until /quit or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() has a history and keys to edit with, then)
    style = "continuing plain text" if conversation.continues(conversation.name) else "chat"
    name = conversation.engine.base.identity.name
    screen.say(f"{name}, {style}. /help lists the commands.", "dim")
    session = _Session(conversation, screen, plain, force)
    while True:
        try:
            line = _read(screen)
        except (EOFError, KeyboardInterrupt):
            screen.say()
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                session.command(line)
            elif line:
                session.answer(line)
        except KeyboardInterrupt:
            screen.say(" (stopped)", "dim")
        except MlxLoraError as error:
            screen.say(str(error), "red")


def _read(screen: Screen) -> str:
    line = screen.ask("> ").strip()
    while line.endswith("\\"):
        line = line[:-1] + "\n" + screen.ask("  ")
    return line


class _Session:
    """What the commands change."""

    def __init__(
        self, conversation: Conversation, screen: Screen, plain: bool, force: bool
    ) -> None:
        self._conversation, self._screen = conversation, screen
        self._plain, self._force = plain, force
        self._compared: list[str | None] = []
        self._commands: dict[str, Callable[[str], str]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/adapter": self._adapter,
            "/compare": self._compare,
            "/plain": self._as_written,
            "/save": self._save,
            "/load": self._load,
            "/help": lambda _: HELP,
        }

    def command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            self._screen.say(f"no command {name}; /help lists them", "yellow")
        else:
            self._screen.say(self._commands[name](argument.strip()), "dim")

    def answer(self, text: str) -> None:
        if not self._compared:
            self._show(self._conversation.name, self._conversation.say(text))
            return
        heard = ["" for _ in self._compared]
        for number, piece in self._conversation.compare(text, self._compared):
            heard[number] += piece
            self._screen.progress("characters written:", sum(map(len, heard)), of=None)
        for name, answer in zip(self._compared, heard, strict=True):
            self._screen.heading(name or "the bare base")
            self._show(name, iter([answer]))

    def _show(self, name: str | None, pieces: Iterator[str]) -> None:
        if self._plain or self._conversation.continues(name):
            self._screen.stream(pieces)
        else:
            speak(self._screen, pieces)

    def _as_written(self, _: str) -> str:
        self._plain = not self._plain
        return "answers as they are written" if self._plain else "answers as Markdown"

    def _reset(self, _: str) -> str:
        self._conversation.reset()
        return "forgotten"

    def _system(self, text: str) -> str:
        self._conversation.system = text
        self._conversation.reset()
        return "system prompt set; conversation forgotten" if text else "no system prompt any more"

    def _adapter(self, name: str) -> str:
        if not name:
            known = ", ".join(self._conversation.engine.names) or "no adapter"
            return f"{known}; in use: {_said(self._conversation.name)}"
        self._conversation.use(self._loaded(name))
        return f"now with {_said(self._conversation.name)}"

    def _compare(self, names: str) -> str:
        chosen = [self._loaded(name) for name in names.split()]
        if len(chosen) == 1:
            raise ConfigError("compare at least two: /compare A B")
        self._compared = chosen
        if not chosen:
            return f"one answers again: {_said(self._conversation.name)}"
        return f"each prompt is answered by {', '.join(map(_said, chosen))}"

    def _save(self, file: str) -> str:
        count = self._conversation.save(Path(_needed(file, "/save FILE")))
        return f"{count} messages written to {file}"

    def _load(self, file: str) -> str:
        count = self._conversation.load(Path(_needed(file, "/load FILE")))
        return f"{count} messages; go on"

    def _loaded(self, name: str) -> str | None:
        """The adapter of this name or directory; loaded now, if it was not."""
        known = self._conversation.engine.names
        if name in known or name not in NONE:
            if name not in known:
                self._conversation.add(name, Adapter.load(name), force=self._force)
            return name
        return None


def _needed(argument: str, usage: str) -> str:
    if not argument:
        raise ConfigError(f"which file? {usage}")
    return argument


def _said(name: str | None) -> str:
    return name or "the bare base"
