"""The language the tiny base is trained on: short English exchanges, made by rule.

Every exchange asks for something whose answer stands in the prompt: repeat it, quote it, put
it in a list, look it up in a table, name who did what and when, fill it into a form. Because
the values come from open vocabularies (words.py), the answer has to be copied, selected and
arranged, which is what fine-tuning later builds on. A few exchanges are plain small talk.

A skill is a function of a random.Random that returns one (user, assistant) pair; SKILLS says
how often each occurs. rows() strings them into chat rows. The corpus has lists and records in
JSON, but none of the commands of task.py: those are left for fine-tuning to teach.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import words

Exchange = tuple[str, str]  # what the user says, what the assistant answers
Skill = Callable[[Random], Exchange]


# Copying


def phrase(random: Random) -> str:
    """One or more values in a row, to be copied as they are."""
    kinds = random.choices(words.KINDS, k=random.choice((1, 1, 2, 3, 4)))
    return " ".join(kind(random) for kind in kinds)


def repeat(random: Random) -> Exchange:
    text = phrase(random)
    ask = random.choice(("Repeat: {}", "Say this again: {}", "Copy this text.\n{}", "Echo {}"))
    return ask.format(text), text


def repeat_twice(random: Random) -> Exchange:
    text = random.choice(words.KINDS)(random)
    count = random.choice((2, 3))
    ask = random.choice(("Say {1} {0} times.", "Write {1} {0} times.", "{1}, {0} times please"))
    return ask.format(("two", "three")[count - 2], text), " ".join([text] * count)


WRAPPINGS = {
    "quotes": ('"', '"'),
    "double quotes": ('"', '"'),
    "brackets": ("[", "]"),
    "square brackets": ("[", "]"),
    "parentheses": ("(", ")"),
    "braces": ("{", "}"),
    "stars": ("*", "*"),
    "angle brackets": ("<", ">"),
}


def wrap(random: Random) -> Exchange:
    how = random.choice(list(WRAPPINGS))
    left, right = WRAPPINGS[how]
    text = random.choice(words.KINDS)(random)
    ask = random.choice(("Put {0} in {1}.", "Write {0} in {1}", "{1} around {0}, please"))
    return ask.format(text, how), f"{left}{text}{right}"


def wrap_part(random: Random) -> Exchange:
    """Quote or bracket one word of a sentence and copy the rest."""
    scene = Scene.draw(random)
    sentence = scene.sentence(random)
    how = random.choice(("quotes", "brackets", "stars"))
    left, right = WRAPPINGS[how]
    part = random.choice([p for p in (scene.who, scene.what, scene.when) if p in sentence])
    ask = random.choice(("Put {0} in {1}: {2}", "{2}\nWrite that with {1} around {0}."))
    return ask.format(part, how, sentence), sentence.replace(part, left + part + right, 1)


def unwrap(random: Random) -> Exchange:
    """Find the quoted or bracketed words in a longer line."""
    how = random.choice(("quotes", "brackets", "parentheses", "braces"))
    left, right = WRAPPINGS[how]
    before, inside, after = (random.choice(words.KINDS)(random) for _ in range(3))
    ask = random.choice(("What is in {1}? {0}", "Give me the words in {1}: {0}"))
    return ask.format(f"{before} {left}{inside}{right} {after}", how), inside


# Words and letters


def spell(random: Random) -> Exchange:
    word = random.choice((words.name, words.noun))(random)
    joint = random.choice(("-", " "))
    ask = random.choice(("Spell {}.", "Spell {} for me", "How do you spell {}?"))
    return ask.format(word) + (" Use dashes." if joint == "-" else ""), joint.join(word)


def change_case(random: Random) -> Exchange:
    word = random.choice(words.NOUNS + words.COLOURS + words.NAMES)
    ask, change = random.choice(
        (
            ("Write {} in upper case.", str.upper),
            ("Write {} in capitals", str.upper),
            ("Write {} with a capital letter.", str.capitalize),
            ("Write {} in lower case.", str.lower),
        )
    )
    shown = word.capitalize() if change is str.lower else word
    return ask.format(shown), change(word)


def word_at(random: Random) -> Exchange:
    """The first, last or a neighbouring word of a line."""
    line = words.several(random, random.randint(3, 5))
    line = [value.split()[-1] for value in line]
    index = random.randrange(len(line) - 1)
    ask, answer = random.choice(
        (
            ("What is the first word: {}", line[0]),
            ("First word of: {}", line[0]),
            ("What is the last word: {}", line[-1]),
            ("Last word of: {}", line[-1]),
            (f"Which word comes after {line[index]}? {{}}", line[index + 1]),
            (f"Which word comes before {line[index + 1]}? {{}}", line[index]),
        )
    )
    return ask.format(" ".join(line)), answer


# Lists


def as_list(items: list[str], form: str) -> str:
    """Write items in one of the list forms of LIST_FORMS."""
    if form == "numbered":
        return "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    if form == "JSON":
        return json.dumps(items, separators=(",", ":"))
    if form == "sentence":
        return ", ".join(items[:-1]) + f" and {items[-1]}" if len(items) > 1 else items[0]
    return {"comma": ", ", "bulleted": "\n- ", "slash": " / ", "line": "\n"}[form].join(
        [("- " if form == "bulleted" else "") + items[0], *items[1:]]
    )


LIST_FORMS = {
    "comma": ("a comma list", "a list with commas"),
    "bulleted": ("a bulleted list", "bullets"),
    "numbered": ("a numbered list", "numbers"),
    "slash": ("a list with slashes", "words between slashes"),
    "line": ("lines", "one item a line"),
    "JSON": ("a JSON list", "a JSON array"),
    "sentence": ("a list with and", "a sentence"),
}


def reform_list(random: Random) -> Exchange:
    items = words.several(random, random.randint(2, 5))
    before, after = random.sample(list(LIST_FORMS), 2)
    ask = random.choice(("Write as {1}: {0}", "Make {1} of this:\n{0}", "{0}\nAs {1}, please."))
    return ask.format(as_list(items, before), random.choice(LIST_FORMS[after])), as_list(
        items, after
    )


def reorder_list(random: Random) -> Exchange:
    items = words.several(random, random.randint(2, 4))
    form = random.choice(("comma", "bulleted", "numbered", "JSON"))
    ask, answer = random.choice(
        (
            ("Reverse the list: {}", items[::-1]),
            ("Write this backwards, last item first: {}", items[::-1]),
            ("Swap the first and the last item: {}", [items[-1], *items[1:-1], items[0]]),
            ("Move the first item to the end: {}", [*items[1:], items[0]]),
            ("Leave out the first item: {}", items[1:]),
            ("Leave out the last item: {}", items[:-1]),
        )
    )
    return ask.format(as_list(items, form)), as_list(answer, form)


def sort_list(random: Random) -> Exchange:
    """Put numbers or letters in order."""
    if random.random() < 0.5:
        values = random.sample(range(1, 10), random.randint(2, 4))
    else:
        values = random.sample(range(10, 100), random.randint(2, 3))
    items = [str(value) for value in values]
    ordered = [str(value) for value in sorted(values)]
    ask, answer = random.choice(
        (
            ("Sort: {}", ordered),
            ("Sort from large to small: {}", ordered[::-1]),
            ("Which is the largest? {}", ordered[-1:]),
            ("Which is the smallest? {}", ordered[:1]),
        )
    )
    return ask.format(as_list(items, "comma")), as_list(answer, "comma")


def list_item(random: Random) -> Exchange:
    items = words.several(random, random.randint(3, 5))
    form = random.choice(list(LIST_FORMS))
    index = random.randrange(len(items))
    which = ["first", "second", "third", "fourth", "fifth"][index]
    if index == len(items) - 1 and random.random() < 0.5:
        which = "last"
    ask = random.choice(("What is the {1} item?\n{0}", "{0}\nThe {1} one, please."))
    return ask.format(as_list(items, form), which), items[index]


def edit_list(random: Random) -> Exchange:
    """Add, remove or replace an item."""
    *items, extra = words.several(random, random.randint(3, 5))
    form = random.choice(list(LIST_FORMS))
    index = random.randrange(len(items))
    old = items[index]
    without = items[:index] + items[index + 1 :]
    ask, answer = random.choice(
        (
            (f"Add {extra} to the end of this list: {{}}", [*items, extra]),
            (f"Put {extra} first: {{}}", [extra, *items]),
            (f"Remove {old}: {{}}", without),
            (f"Change {old} to {extra}: {{}}", [*items[:index], extra, *items[index + 1 :]]),
        )
    )
    return ask.format(as_list(items, form)), as_list(answer, form)


def count_list(random: Random) -> Exchange:
    items = words.several(random, random.randint(1, 6))
    ask = random.choice(("How many items are there? {}", "Count the items: {}"))
    return ask.format(as_list(items, random.choice(("comma", "line")))), str(len(items))


def is_listed(random: Random) -> Exchange:
    *items, extra = words.several(random, random.randint(3, 5))
    sought = random.choice((extra, random.choice(items)))
    ask = random.choice(("Is {1} in this list? {0}", "{0}\nDoes the list have {1}?"))
    answer = f"Yes, {sought} is in the list." if sought in items else f"No, there is no {sought}."
    return ask.format(as_list(items, random.choice(("comma", "line"))), sought), answer


# Tables and pairs


TABLE_COLUMNS: dict[str, Callable[[Random], str]] = {
    "name": words.name,
    "thing": words.thing,
    "room": words.room,
    "time": words.clock,
    "day": words.day,
    "date": words.date,
    "number": words.number,
    "colour": words.colour,
    "place": words.place,
    "song": words.title,
    "code": words.made_up,
}


def table(random: Random) -> Exchange:
    """Look up a cell, a row or a column in a small table whose first column is a name."""
    columns = ["name", *random.sample([c for c in TABLE_COLUMNS if c != "name"], 2)]
    rows = [[TABLE_COLUMNS[c](random) for c in columns] for _ in range(random.randint(2, 3))]
    shown = "\n".join(" | ".join(row) for row in [columns, *rows])
    row = random.choice(rows)
    column = random.randrange(1, len(columns))
    ask, answer = random.choice(
        (
            (f"What is the {columns[column]} of {row[0]}?", row[column]),
            (f"{row[0]}: which {columns[column]}?", row[column]),
            (f"Which name has {row[column]}?", row[0]),
            (f"Show the row of {row[0]}.", " | ".join(row)),
            (f"List the column {columns[column]}.", "\n".join(r[column] for r in rows)),
            ("List the names.", as_list([r[0] for r in rows], "comma")),
        )
    )
    return f"{shown}\n{ask}", answer


def code_words(random: Random) -> Exchange:
    """A made-up dictionary in the prompt, and one look-up."""
    keys = words.several(random, random.randint(2, 4))
    values = [random.choice(words.KINDS)(random) for _ in keys]
    pattern = random.choice(("{} = {}", "{} means {}", "{}: {}", "{} -> {}"))
    shown = random.choice((", ", "\n")).join(
        pattern.format(key, value) for key, value in zip(keys, values, strict=True)
    )
    index = random.randrange(len(keys))
    ask = random.choice(("What is {}?", "{}?", "Look up {}.", "What does {} mean?"))
    return f"{shown}\n{ask.format(keys[index])}", values[index]


def fill_form(random: Random) -> Exchange:
    """Put values into the marked places of a sentence."""
    form = random.choice(
        (
            "Dear NAME, see you at TIME in PLACE.",
            "NAME has the THING.",
            "The THING is in the ROOM until TIME.",
            "NAME lives near PLACE and likes COLOUR.",
            "Room ROOM, DAY at TIME: NAME",
            "<NAME> TIME <THING>",
            "(NAME, TIME)",
            '["NAME","THING","PLACE"]',
            "{NAME: THING}",
        )
    )
    kinds = {key.upper(): kind for key, kind in TABLE_COLUMNS.items()}
    values = {key: kind(random) for key, kind in kinds.items() if key in form}
    answer = form
    for key, value in values.items():
        answer = answer.replace(key, value)
    given = ", ".join(f"{key} = {value}" for key, value in values.items())
    return random.choice(("Fill in: {0}\n{1}", "{1}\nFill in the form: {0}")).format(
        form, given
    ), answer


# Who, what, where, when


@dataclass(frozen=True)
class Scene:
    """One event: who does what, where and when."""

    who: str
    what: str  # an infinitive: "wash the lamp"
    where: str
    when: str

    @classmethod
    def draw(cls, random: Random) -> "Scene":
        """A random event."""
        place = random.choice(("in the " + words.room(random), "at " + words.place(random)))
        when = random.choice(
            (
                "at " + words.clock(random),
                "at " + words.clock(random),
                "on " + words.day(random),
                "on " + words.date(random),
                f"in {words.number(random)} {random.choice(('minutes', 'hours', 'days'))}",
            )
        )
        return cls(words.name(random), words.action(random), place, when)

    def sentence(self, random: Random) -> str:
        """The event told or asked for in one of many ways."""
        pattern = random.choice(
            (
                "{who} will {what} {where} {when}.",
                "{who} has to {what} {when} {where}.",
                "{when}, {who} will {what} {where}.",
                "{where}, {who} must {what} {when}.",
                "{who} wants to {what} {where} {when}.",
                "It is the plan of {who} to {what} {where} {when}.",
                "{when} {where}: {who} will {what}.",
                "Please ask {who} to {what} {where} {when}.",
                "Tell {who} to {what} {when} {where}.",
                "Could {who} {what} {where} {when}?",
                "I hope that {who} can {what} {where}, {when}.",
                "{who}, please {what} {when}, {where}.",
            )
        )
        told = pattern.format(who=self.who, what=self.what, where=self.where, when=self.when)
        return told[0].upper() + told[1:]

    def fields(self) -> dict[str, str]:
        """The four parts under the names by which records ask for them."""
        where = self.where.removeprefix("in ").removeprefix("at ")
        when = self.when.removeprefix("at ").removeprefix("on ")
        return {"who": self.who, "what": self.what, "where": where, "when": when}


def question(random: Random) -> Exchange:
    """A paragraph of one to three events and one question about it."""
    scenes = [Scene.draw(random) for _ in range(random.choice((1, 2, 2, 3)))]
    told = " ".join(scene.sentence(random) for scene in scenes)
    scene = random.choice(scenes)
    ask, answer = random.choice(
        (
            (f"Who will {scene.what}?", scene.who),
            (f"Who is there {scene.when}?", scene.who),
            (f"What will {scene.who} do?", scene.what),
            (f"Where will {scene.who} be?", scene.where),
            (f"When will {scene.who} {scene.what}?", scene.when),
            (f"When is it {scene.where}?", scene.when),
            ("Who is named?", as_list([s.who for s in scenes], "comma")),
        )
    )
    return random.choice(("{0}\n{1}", "{0} {1}", "{1}\n{0}")).format(told, ask), answer


def write_record(fields: dict[str, str], form: str) -> str:
    """Write fields as lines, pairs, a table row or a JSON object."""
    if form == "JSON":
        return json.dumps(fields, separators=(",", ":"))
    if form == "row":
        return " | ".join(fields.values())
    pattern, joint = {"lines": ("{}: {}", "\n"), "pairs": ("{}={}", "; ")}[form]
    return joint.join(pattern.format(key, value) for key, value in fields.items())


RECORD_ASKS = {
    "lines": ("Give {}.", "Note {} as lines."),
    "pairs": ("Give {} as pairs.", "Pairs of {}:"),
    "row": ("Give {} as a row.", "Row of {}:"),
    "JSON": ("Give {} as JSON.", "JSON of {}:"),
}


def record(random: Random) -> Exchange:
    """Extract named parts of a sentence, in the asked order and form."""
    scene = Scene.draw(random)
    fields = scene.fields()
    keys = random.sample(list(fields), random.randint(1, 4))
    form = random.choice(("lines", "pairs", "row", "JSON", "JSON"))
    ask = random.choice(RECORD_ASKS[form]).format(", ".join(keys))
    answer = write_record({key: fields[key] for key in keys}, form)
    return random.choice(("{0}\n{1}", "{1}\n{0}")).format(scene.sentence(random), ask), answer


def convert_record(random: Random) -> Exchange:
    """Rewrite a record of mixed values in another form."""
    keys = random.sample(list(TABLE_COLUMNS), random.randint(2, 4))
    fields = {key: TABLE_COLUMNS[key](random) for key in keys}
    before, after = random.sample(("lines", "pairs", "JSON"), 2)
    kept = random.sample(keys, random.choice((len(keys), random.randint(1, len(keys)))))
    ask = random.choice(RECORD_ASKS[after]).format(", ".join(kept))
    return f"{write_record(fields, before)}\n{ask}", write_record(
        {key: fields[key] for key in kept}, after
    )


def note(random: Random) -> Exchange:
    """Short remarks about things, turned into records with the names asked for."""
    pattern, kinds = random.choice(
        (
            ("the {} costs {} coins", {"thing": words.thing, "number": words.number}),
            ("{} has {} pieces of {}", {"n": words.name, "k": words.number, "x": words.noun}),
            ("the {} in the {} is {}", {"x": words.noun, "r": words.room, "c": words.colour}),
            ("{} sings {}", {"singer": words.name, "song": words.title}),
            ("{} wrote {} on {}", {"name": words.name, "title": words.title, "day": words.day}),
            ("{} lives in {}", {"name": words.name, "town": words.place}),
            ("the train to {} leaves at {}", {"to": words.place, "at": words.clock}),
            ("{} is {} years old", {"name": words.name, "age": words.number}),
        )
    )
    fields = {key: kind(random) for key, kind in kinds.items()}
    told = pattern.format(*fields.values())
    form = random.choice(("lines", "pairs", "row", "JSON", "JSON"))
    ask = random.choice(RECORD_ASKS[form]).format(", ".join(fields))
    return f"{told[0].upper()}{told[1:]}.\n{ask}", write_record(fields, form)


# Rewriting


def rewrite(random: Random) -> Exchange:
    """Say an event again with another person or time, or in another form."""
    scene, other = Scene.draw(random), Scene.draw(random)
    sentence = scene.sentence(random)
    told = f"{scene.who} will {scene.what} {scene.where} {scene.when}."
    ask, answer = random.choice(
        (
            (f"Change {scene.who} to {other.who}", sentence.replace(scene.who, other.who)),
            (f"Say {other.when} instead", f"{scene.who} will {scene.what} {other.when}."),
            ("Say it simply", told),
            ("Ask it", f"Will {scene.who} {scene.what} {scene.where} {scene.when}?"),
            ("Deny it", f"{scene.who} will not {scene.what} {scene.where} {scene.when}."),
            ("Leave out the time", f"{scene.who} will {scene.what} {scene.where}."),
            ("Leave out the place", f"{scene.who} will {scene.what} {scene.when}."),
            ("Say it short", f"{scene.who}: {scene.what}"),
        )
    )
    return random.choice(("{1}: {0}", "{0}\n{1}.")).format(sentence, ask), answer


def joined(random: Random) -> Exchange:
    """Two facts with something in common made into one sentence."""
    one, two = Scene.draw(random), Scene.draw(random)
    told = f"{one.who} will {one.what}. {two.who} will {one.what}."
    answer = f"{one.who} and {two.who} will {one.what}."
    return random.choice(("Join: {}", "Make one sentence: {}")).format(told), answer


# Numbers and days


def arithmetic(random: Random) -> Exchange:
    """Sums and differences of small numbers."""
    a, b = random.randrange(10), random.randrange(10)
    if random.random() < 0.5:
        return random.choice(("{} + {}", "What is {} plus {}?")).format(a, b), str(a + b)
    return random.choice(("{} - {}", "What is {} minus {}?")).format(a + b, b), str(a)


def next_day(random: Random) -> Exchange:
    index = random.randrange(7)
    step, word = random.choice(((1, "after"), (-1, "before")))
    answer = words.DAYS[(index + step) % 7]
    ask = random.choice(("Which day comes {} {}?", "What day is {} {}?"))
    return ask.format(word, words.DAYS[index]), answer


# Talk


def greeting(random: Random) -> Exchange:
    who = words.name(random)
    return random.choice(
        (
            ("Hello!", "Hello! What can I do for you?"),
            ("Good morning", "Good morning! What can I do for you?"),
            (f"I am {who}.", f"Hello, {who}."),
            (f"My name is {who}.", f"Nice to meet you, {who}."),
            (f"Say hello to {who}.", f"Hello, {who}!"),
            ("Thank you!", "You are welcome."),
            ("What can you do?", "I copy, list, look up and rewrite short texts."),
            ("Who are you?", "I am a very small language model."),
        )
    )


def story(random: Random) -> Exchange:
    """A story of a few sentences about a given person and thing."""
    who, what = words.name(random), words.thing(random)
    place, when = words.place(random), words.day(random)
    feeling = random.choice(("happy", "tired", "proud", "surprised"))
    answer = random.choice(
        (
            f"{who} had a {what}. On {when} {who} took the {what} to {place}. {who} was {feeling}.",
            f"One day {who} found a {what} near {place}. It was {feeling} {who} who kept it.",
            f"{who} looked for the {what}. It was in {place}. On {when} {who} was {feeling} again.",
        )
    )
    ask = random.choice(("Tell a story about {} and a {}.", "Write about {} and the {}."))
    return ask.format(who, what), answer


SKILLS: tuple[tuple[Skill, int], ...] = (
    (repeat, 10),
    (repeat_twice, 3),
    (wrap, 7),
    (wrap_part, 4),
    (unwrap, 4),
    (spell, 2),
    (change_case, 1),
    (word_at, 4),
    (reform_list, 8),
    (reorder_list, 5),
    (sort_list, 1),
    (list_item, 5),
    (edit_list, 5),
    (count_list, 1),
    (is_listed, 2),
    (table, 7),
    (code_words, 6),
    (fill_form, 6),
    (question, 12),
    (record, 14),
    (convert_record, 7),
    (note, 7),
    (rewrite, 7),
    (joined, 2),
    (arithmetic, 1),
    (next_day, 1),
    (greeting, 2),
    (story, 2),
)


def exchange(random: Random) -> Exchange:
    """One (user, assistant) pair of a random skill."""
    skills, weights = zip(*SKILLS, strict=True)
    skill: Skill = random.choices(skills, weights)[0]
    return skill(random)


def turns(pairs: list[Exchange]) -> list[dict[str, str]]:
    """Chat messages of (user, assistant) pairs."""
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def remembered(random: Random) -> list[dict[str, str]]:
    """A conversation whose last question is about something said earlier, or in the system turn."""
    who, helper = words.name(random), words.name(random)
    last = random.choice(
        (("What is my name?", f"Your name is {who}."), ("Who are you?", f"I am {helper}."))
    )
    first = (f"I am {who}.", f"Hello, {who}.")
    middle = [exchange(random)] if random.random() < 0.5 else []
    system = {"role": "system", "content": f"Your name is {helper}."}
    return [system, *turns([first, *middle, last])]


def conversation(random: Random) -> list[dict[str, str]]:
    """The messages of one row: mostly one exchange, sometimes more, sometimes a system turn."""
    if random.random() < 0.03:
        return remembered(random)
    pairs = [exchange(random) for _ in range(random.choice((1, 1, 1, 2)))]
    if random.random() < 0.05:
        return [{"role": "system", "content": "You answer briefly."}, *turns(pairs)]
    return turns(pairs)


def rows(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield count chat rows; equal seeds give equal rows."""
    random = Random(seed)
    for _ in range(count):
        yield {"messages": conversation(random)}


def copying(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield count rows that only repeat four to nine unrelated values.

    Copying by looking back appears suddenly in training, and far sooner when every row needs
    it; a model that starts the corpus with it learns the rest from there.
    """
    random = Random(seed)
    for _ in range(count):
        kinds = random.choices(words.KINDS, k=random.randint(4, 9))
        text = " ".join(kind(random) for kind in kinds)
        yield {"messages": turns([("Repeat: " + text, text)])}
