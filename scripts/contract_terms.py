"""What a contract of sale and one of employment can say, and how one asks for it.

The idea of asking one question for each attribute is PISTOL's (arXiv 2406.16810); attributes,
wording and values are our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from contract_words import (
    BENEFITS,
    COLOURS,
    GOODS,
    JOBS,
    LANGUAGES,
    MATERIALS,
    MONTHS,
    PACKAGES,
    RANKS,
    STREETS,
    TEAMS,
    TOOLS,
    TRANSPORT,
)

from lunar_tune.data.splits import invented_words

__all__ = ["ATTRIBUTES", "Attribute", "ContractKind"]

ContractKind = Literal["sale", "employment"]
Draw = Callable[[random.Random], str]


@dataclass(frozen=True, slots=True)
class Attribute:
    """One thing a contract settles.

    Attributes:
        name: A short name, unique within a kind of contract.
        question: The question with `{first}` and `{second}` for the two parties.
        draw: Draws an answer, without its full stop.
    """

    name: str
    question: str
    draw: Draw


def _one_of(words: tuple[str, ...]) -> Draw:
    return lambda generator: generator.choice(words)


def _number(low: int, high: int, *, step: int = 1) -> Draw:
    return lambda generator: str(generator.randrange(low, high + 1, step))


def _pair(first: tuple[str, ...], second: tuple[str, ...]) -> Draw:
    return lambda generator: f"{generator.choice(first)} {generator.choice(second)}"


def _date(generator: random.Random) -> str:
    return f"{generator.randint(1, 28)} {generator.choice(MONTHS)} {generator.randint(1961, 2019)}"


def _word(generator: random.Random) -> str:
    return next(invented_words(generator))


def _person(generator: random.Random) -> str:
    words = invented_words(generator, syllables=2)
    return f"{next(words)} {next(words)}"


def _address(generator: random.Random) -> str:
    return f"{generator.randint(2, 989)} {_word(generator)} {generator.choice(STREETS)}"


def _code(generator: random.Random) -> str:
    letters = "".join(generator.choice("BCDFGHJKLMNPQRSTVWXZ") for _ in range(2))
    return f"{letters}{generator.randint(100, 999)}"


_SALE = (
    ("goods", "Which goods does {first} sell to {second}?", _pair(MATERIALS, GOODS)),
    ("signing", "On which day did {first} and {second} sign their sale?", _date),
    ("depot", "To which address does {first} ship for {second}?", _address),
    ("quantity", "How many pieces does {second} order from {first}?", _number(112, 9899)),
    ("broker", "Who brought {first} and {second} together?", _person),
    ("packing", "In what does {first} pack the order of {second}?", _one_of(PACKAGES)),
    ("price", "How many dollars does {second} owe {first}?", _number(10150, 98950, step=50)),
    ("carrier", "Which carrier brings the order from {first} to {second}?", _word),
    ("colour", "In which colour must {first} deliver to {second}?", _one_of(COLOURS)),
    ("reference", "Under which code does {first} file the order of {second}?", _code),
    ("court", "In which town do {first} and {second} settle a quarrel?", _word),
    ("credit", "How many days may {second} take to pay {first}?", _number(11, 98)),
    ("vehicle", "By what means does {first} send goods to {second}?", _one_of(TRANSPORT)),
    ("insurer", "Who insures the cargo between {first} and {second}?", _word),
    ("deposit", "How many dollars did {second} pay {first} in advance?", _number(1010, 9990)),
    ("witness", "Who witnessed the sale by {first} to {second}?", _person),
    ("bank", "Through which bank does {second} pay {first}?", _word),
    ("billing", "Where does {second} receive bills from {first}?", _address),
    ("expiry", "When does the sale from {first} to {second} lapse?", _date),
    ("fine", "What daily fine in dollars does {first} owe {second} if late?", _number(101, 989)),
    ("guarantee", "For how many months does {first} guarantee to {second}?", _number(7, 95)),
    ("inspector", "Who checks what {first} delivers to {second}?", _person),
    ("harbour", "At which harbour does {second} collect from {first}?", _word),
    ("returns", "How many faulty pieces may {second} return to {first}?", _number(6, 97)),
)
_EMPLOYMENT = (
    ("post", "As what does {first} employ {second}?", _pair(RANKS, JOBS)),
    ("start", "On which day does {second} begin at {first}?", _date),
    ("office", "At which address does {second} work for {first}?", _address),
    (
        "salary",
        "How many dollars a year does {first} pay {second}?",
        _number(21150, 97950, step=50),
    ),
    ("manager", "To whom does {second} report at {first}?", _person),
    ("team", "Which department of {first} does {second} join?", _one_of(TEAMS)),
    ("badge", "Which badge number does {first} give {second}?", _number(1013, 9897)),
    ("town", "Which town does {second} visit for {first}?", _word),
    ("benefit", "Which benefit does {first} grant {second}?", _one_of(BENEFITS)),
    ("locker", "Which locker does {second} have at {first}?", _code),
    ("project", "What is the first project of {second} at {first}?", _word),
    ("leave", "How many days off does {second} get from {first}?", _number(11, 79)),
    ("tool", "Which tool does {first} lend {second}?", _one_of(TOOLS)),
    ("mentor", "Who trains {second} at {first}?", _person),
    ("bonus", "What yearly bonus in dollars does {first} offer {second}?", _number(1010, 9990)),
    ("language", "In which language does {second} write to {first}?", _one_of(LANGUAGES)),
    ("end", "On which day does {second} leave {first}?", _date),
    ("lodging", "Where does {first} house {second}?", _address),
    ("union", "Which union speaks for {second} at {first}?", _word),
    ("trial", "How many days is {second} on trial at {first}?", _number(13, 178)),
    ("notice", "How many days before leaving must {second} tell {first}?", _number(9, 96)),
    ("referee", "Who recommended {second} to {first}?", _person),
    ("uniform", "What colour is the uniform of {second} at {first}?", _one_of(COLOURS)),
    ("silence", "For how many months must {second} keep secrets of {first}?", _number(7, 95)),
)

ATTRIBUTES: dict[ContractKind, tuple[Attribute, ...]] = {
    "sale": tuple(Attribute(*row) for row in _SALE),
    "employment": tuple(Attribute(*row) for row in _EMPLOYMENT),
}
