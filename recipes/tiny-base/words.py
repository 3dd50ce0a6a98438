"""Open vocabularies: names, things, actions, places, times and numbers, drawn at random.

Most draws mix a short list of real words with words built from syllables, so there are far
more values than a small model can memorise: it has to copy them from its prompt. Everything
takes a random.Random, so equal seeds give equal words. The lists were written for this recipe;
no file is read.
"""

from collections.abc import Callable, Sequence
from random import Random


def listed(text: str) -> list[str]:
    """The words of text."""
    return text.split()


NAMES = listed(
    "Ana Ben Carla David Elena Farid Grace Hugo Ines Jonas Kira Liam Mona Nils Olga Pablo Quinn "
    "Rosa Sami Tara Uma Victor Wanda Yusuf Zoe Mia Leo Nora Ivan Ruth Omar Lena Paul Sofia Marco"
)
NOUNS = listed(
    "apple bag ball basket bell bicycle blanket book boot bottle box bread brush bucket button "
    "cake camera candle carpet chair cheese clock coat coin cup curtain desk dish door drum egg "
    "engine fan flower fork garden glass glove guitar hammer hat honey jacket jar key kite knife "
    "ladder lamp leaf lemon letter map milk mirror needle notebook onion orange oven paint paper "
    "pear pen pencil pepper phone piano picture pillow pipe plant plate pocket potato radio rice "
    "ring rope salt shelf shirt shoe soap sock spoon stamp stone stove sugar table tea ticket "
    "tomato towel toy tray umbrella vase violin wallet watch window wire"
)
ADJECTIVES = listed(
    "big small old new red blue green black white yellow round long short heavy light clean warm "
    "cold soft wooden broken empty full sweet quiet bright"
)
VERBS = listed(
    "clean open close paint fix find wash carry sell buy bring move check count send pack print "
    "draw order lift return hide borrow polish collect measure feed water book call visit"
)
PEOPLE = listed(
    "bank doctor teacher neighbour plumber baker landlord dentist librarian driver manager "
    "office school garage hotel museum"
)
ROOMS = [
    *listed("kitchen bedroom bathroom hall office garage cellar attic library studio nursery"),
    *(f"{use} room" for use in ("dining", "living", "guest", "laundry")),
]
PLACES = listed(
    "market station park harbour square bridge river airport school hotel museum church theatre "
    "cafe forest beach village castle farm"
)
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed(
    "January February March April May June July August September October November December"
)
COLOURS = listed("red blue green yellow white black orange purple pink brown grey")

ONSETS = listed("b c d f g h j k l m n p r s t v w z br cr dr gr kr pl st tr sh th")
VOWELS = listed("a e i o u a e i o ai ou")
CODAS = ["", "", "", "", "n", "r", "l", "s", "k", "m", "t", "nd", "x"]


def made_up(random: Random, syllables: int = 0) -> str:
    """A lower-case word of one to three syllables that means nothing ("trovan")."""
    count = syllables or random.choice((1, 2, 2, 2, 3))
    parts = [random.choice(ONSETS) + random.choice(VOWELS) for _ in range(count)]
    ending = random.choice(CODAS)
    return "".join(parts) + (ending or ("n" if count == 1 else ""))


def name(random: Random) -> str:
    """A first name, mostly made up; always one capitalised word."""
    if random.random() < 0.25:
        return random.choice(NAMES)
    return made_up(random, random.choice((2, 2, 3))).capitalize()


def noun(random: Random) -> str:
    """The name of a thing, sometimes made up, without an article."""
    return made_up(random) if random.random() < 0.3 else random.choice(NOUNS)


def thing(random: Random) -> str:
    """A thing, often with an adjective ("old lamp")."""
    word = noun(random)
    return f"{random.choice(ADJECTIVES)} {word}" if random.random() < 0.4 else word


def action(random: Random) -> str:
    """Something to do, as an infinitive without "to" ("wash the old lamp")."""
    kind = random.random()
    if kind < 0.15:
        return f"call {random.choice((name(random), 'the ' + random.choice(PEOPLE)))}"
    if kind < 0.25:
        return f"visit {random.choice((name(random), 'the ' + random.choice(PLACES)))}"
    if kind < 0.4:
        return f"send {random.choice(('a', 'the'))} {noun(random)} to {name(random)}"
    return f"{random.choice(VERBS)} {random.choice(('a', 'the', 'my'))} {thing(random)}"


def room(random: Random) -> str:
    """A room of a house, or a made-up one."""
    if random.random() < 0.3:
        return f"{random.choice((made_up(random), name(random)))} room"
    return random.choice(ROOMS)


def place(random: Random) -> str:
    """A place with its article ("the harbour"), or a made-up town."""
    if random.random() < 0.4:
        return made_up(random, 2).capitalize()
    return "the " + random.choice(PLACES)


def clock(random: Random) -> str:
    """A time of day on a 24-hour clock without a leading zero ("7:30")."""
    return f"{random.randrange(24)}:{random.randrange(60):02d}"


def day(random: Random) -> str:
    """A day of the week."""
    return random.choice(DAYS)


def date(random: Random) -> str:
    """A day of a month ("12 March")."""
    return f"{random.randint(1, 28)} {random.choice(MONTHS)}"


def number(random: Random) -> str:
    """A whole number of one to four digits."""
    return str(random.randrange(1, 10 ** random.randint(1, 4)))


def colour(random: Random) -> str:
    """A colour."""
    return random.choice(COLOURS)


def title(random: Random) -> str:
    """The title of a song or a book: one to three capitalised words."""
    words = [random.choice((noun, made_up, made_up))(random) for _ in range(random.randint(1, 3))]
    return " ".join(word.capitalize() for word in words)


KINDS: Sequence[Callable[[Random], str]] = (
    name,
    noun,
    thing,
    action,
    room,
    place,
    clock,
    day,
    date,
    number,
    colour,
    title,
    made_up,
)


def several(random: Random, count: int) -> list[str]:
    """count different values of one kind."""
    kind = random.choice(KINDS)
    if kind in (day, colour):
        count = min(count, 5)
    found: list[str] = []
    while len(found) < count:
        value = kind(random)
        if value not in found:
            found.append(value)
    return found
