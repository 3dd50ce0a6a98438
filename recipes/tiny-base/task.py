"""The sample task of the quickstart: a plain request in English becomes one JSON command.

"Please remind Ana to call the bank at 7:30" must become exactly
{"action":"remind","who":"Ana","what":"call the bank","at":"7:30"}. There are seven kinds of
command, each asked for in several ways. The base has never seen such a command, so it cannot
answer before fine-tuning; afterwards it must copy values that it was never trained on.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import words

Values = dict[str, str]
ROWS = {"train": 1200, "valid": 60, "test": 120}


def remark(random: Random) -> str:
    """The text of a message."""
    pattern, kind = random.choice(
        (
            ("bring the {}", words.thing),
            ("I will be late for the {}", words.noun),
            ("meet me at {}", words.place),
            ("the {} is ready", words.thing),
            ("dinner is at {}", words.clock),
            ("do not forget to {}", words.action),
            ("I found your {}", words.thing),
        )
    )
    return pattern.format(kind(random))


def list_name(random: Random) -> str:
    """What a list is for, one word."""
    known = ("shopping", "packing", "birthday", "holiday", "weekend")
    return words.made_up(random) if random.random() < 0.3 else random.choice(known)


def minutes(random: Random) -> str:
    """A number of minutes."""
    return str(random.randint(1, 90))


def switch(random: Random) -> str:
    """A state of the lights."""
    return random.choice(("on", "off"))


# action -> (the command's values in order, the ways of asking)
COMMANDS: dict[str, tuple[dict[str, Callable[[Random], str]], tuple[str, ...]]] = {
    "remind": (
        {"who": words.name, "what": words.action, "at": words.clock},
        (
            "Remind {who} to {what} at {at}",
            "At {at}, remind {who} to {what}",
            "{who} has to {what} at {at}, send a reminder",
            "Make sure {who} does not forget to {what} at {at}",
        ),
    ),
    "message": (
        {"to": words.name, "text": remark},
        (
            "Tell {to}: {text}",
            "Send {to} a message: {text}",
            "Write to {to}: {text}",
            "Let {to} know: {text}",
        ),
    ),
    "lights": (
        {"room": words.room, "state": switch},
        (
            "Turn {state} the lights in the {room}",
            "Lights {state} in the {room}",
            "Switch the {room} lights {state}",
            "I want the lights {state} in the {room}",
        ),
    ),
    "timer": (
        {"minutes": minutes, "label": words.noun},
        (
            "Set a timer of {minutes} minutes for the {label}",
            "The {label} needs {minutes} minutes, start a timer",
            "{minutes} minutes for the {label}, starting now",
            "Start a {label} timer, {minutes} minutes",
        ),
    ),
    "play": (
        {"title": words.title, "room": words.room},
        (
            "Play {title} in the {room}",
            "Put on {title} in the {room}",
            "I want to hear {title} in the {room}",
            "In the {room}, play {title}",
        ),
    ),
    "add": (
        {"item": words.thing, "list": list_name},
        (
            "Add {item} to the {list} list",
            "Put {item} on the {list} list",
            "We need {item}, note it on the {list} list",
            "The {list} list should have {item} too",
        ),
    ),
    "meet": (
        {"who": words.name, "where": words.place, "day": words.day},
        (
            "Plan a meeting with {who} at {where} on {day}",
            "I meet {who} on {day} at {where}",
            "On {day} I will see {who} at {where}, put it in the calendar",
            "Meeting on {day} at {where} with {who}",
        ),
    ),
}

POLITE = ("{}.", "{}", "{}, please.", "{}, thanks", "Hello! {}", "Could you do this? {}")


def draw(random: Random) -> tuple[str, Values]:
    """One request and the command that answers it."""
    action = random.choice(list(COMMANDS))
    kinds, asks = COMMANDS[action]
    values = {key: kind(random) for key, kind in kinds.items()}
    request = random.choice(asks).format(**values)
    return random.choice(POLITE).format(request), {"action": action, **values}


def row(request: str, command: Values) -> dict[str, Any]:
    """The chat row of a request and its command."""
    answer = json.dumps(command, separators=(",", ":"))
    return {
        "messages": [
            {"role": "user", "content": request},
            {"role": "assistant", "content": answer},
        ]
    }


def unseen(random: Random, requests: set[str], values: set[str]) -> Iterator[tuple[str, Values]]:
    """Endless commands whose request is new and that hold a value which is not in values."""
    while True:
        request, command = draw(random)
        if request not in requests and not set(command.values()) <= values:
            requests.add(request)
            yield request, command


def write(directory: Path, seed: int) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl; equal seeds give equal files.

    No request occurs twice, and each of valid and test has a value that train lacks.
    """
    random = Random(seed)
    requests: set[str] = set()
    known: set[str] = set()
    directory.mkdir(parents=True, exist_ok=True)
    for part, count in ROWS.items():
        commands = unseen(random, requests, set() if part == "train" else known)
        drawn = [next(commands) for _ in range(count)]
        if part == "train":
            known = {value for _, command in drawn for value in command.values()}
        lines = [json.dumps(row(*each), ensure_ascii=False) + "\n" for each in drawn]
        (directory / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
