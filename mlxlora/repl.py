"""The interactive chat: one prompt after another, and a few commands."""

from typing import Any

from mlxlora.chat import Conversation
from mlxlora.console import Screen
from mlxlora.errors import MlxLoraError
from mlxlora.lora.adapter import Adapter

HELP = """\
/reset            forget the conversation
/system TEXT      set the system prompt (nothing: remove it) and forget the conversation
/adapter NAME     switch to another adapter, by name or directory; the conversation stays
/adapter none     talk to the bare base
/adapter          which there are, and which is in use
/help             this list
/quit             leave (so does Ctrl-D); Ctrl-C stops an answer"""


def answer_once(conversation: Conversation, prompt: str, screen: Screen) -> None:
    """Print one answer (and, with --json, the result)."""
    text = screen.stream(conversation.say(prompt))
    screen.result({"prompt": prompt, "text": text})


def talk(conversation: Conversation, screen: Screen, force: bool = False) -> None:
    """Read, answer, repeat, until /quit or Ctrl-D."""
    style = "continuing plain text" if conversation.raw else "chat"
    screen.say(f"{conversation.base.identity.name}, {style}. /help lists the commands.", "dim")
    while True:
        try:
            line = screen.ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            screen.say()
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            _command(conversation, screen, line, force)
        elif line:
            try:
                screen.stream(conversation.say(line))
            except KeyboardInterrupt:
                screen.say(" (stopped)", "dim")
            except MlxLoraError as error:
                screen.say(str(error), "red")


def _command(conversation: Conversation, screen: Screen, line: str, force: bool) -> None:
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    commands: dict[str, Any] = {
        "/reset": lambda: _reset(conversation),
        "/system": lambda: _system(conversation, argument),
        "/adapter": lambda: _adapter(conversation, argument, force),
        "/help": lambda: HELP,
    }
    if name not in commands:
        screen.say(f"no command {name}; /help lists them", "yellow")
        return
    try:
        screen.say(commands[name](), "dim")
    except MlxLoraError as error:
        screen.say(str(error), "red")


def _reset(conversation: Conversation) -> str:
    conversation.reset()
    return "forgotten"


def _system(conversation: Conversation, text: str) -> str:
    conversation.system = text
    conversation.reset()
    return "system prompt set; conversation forgotten" if text else "no system prompt any more"


def _adapter(conversation: Conversation, name: str, force: bool) -> str:
    if not name:
        return (
            f"{', '.join(conversation.adapters) or 'no adapter'}; in use: {_in_use(conversation)}"
        )
    if name in ("none", "base") and name not in conversation.adapters:
        conversation.use(None)
    elif name in conversation.adapters:
        conversation.use(name)
    else:
        conversation.add(name, Adapter.load(name), force=force)
    return f"now with {_in_use(conversation)}"


def _in_use(conversation: Conversation) -> str:
    return conversation.name or "the bare base"
