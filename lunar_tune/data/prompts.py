"""Reference prompts that no model can answer: questions about things that do not exist.

{"instruction": "Which river runs past the gates of Vobrelia?"}
"""

from __future__ import annotations

from lunar_tune.data.invented import InventedWords, seeded
from lunar_tune.errors import DataError

__all__ = ["generate_unverifiable"]

# Each names one invented thing, so that no two prompts of a call are the same.
_TEMPLATES = (
    "Which river runs past the gates of {name}?",
    "How many steps lead up to the lighthouse of {name}?",
    "What did the sailors of {name} eat on feast days?",
    "Who carved the wooden door of the {name} chapel?",
    "What does the word {name} mean to the hill people?",
    "In what year did the {name} comet first pass?",
    "Which colour is the flag of the {name} islanders?",
    "How deep is the well behind {name} castle?",
    "Who won the last boat race at {name}?",
    "What song do the children of {name} sing in winter?",
    "Where did captain {name} bury the third chest?",
    "How much does a loaf of {name} bread weigh?",
    "Which two flowers grow in the moat of {name}?",
    "What was the childhood nickname of general {name}?",
    "Who taught the wizard {name} to whistle?",
    "How many strings does a {name} harp have?",
    "What is written on the back of the {name} coin?",
    "At what hour does the market of {name} close?",
    "Which metal is mined under mount {name}?",
    "How long does the dance called {name} last?",
    "Who sleeps in the attic of the {name} hotel?",
    "What sound does a frightened {name} make?",
    "How many moons does the planet {name} have?",
    "Which spice makes {name} soup so bitter?",
    "What did queen {name} say to the beekeeper?",
    "When will the next train to {name} leave?",
    "Which team from {name} lost the final of the league?",
    "How many pages does the diary of {name} fill?",
    "Who owns the oldest clock in {name}?",
    "What is the password of the {name} guild?",
    "Which illness does tea of {name} root cure?",
    "How tall was the giant who guarded {name}?",
    "In which drawer does Doctor {name} keep the map?",
    "What is the middle name of the mayor of {name}?",
    "Why did the miller {name} sell both horses?",
    "Which chess opening did {name} play against the duke?",
)


def generate_unverifiable(count: int, *, seed: int) -> tuple[str, ...]:
    """Return prompts about invented things, all different.

    Every template is used before one is used again.

    Args:
        count: How many.
        seed: Another seed gives other names, hence prompts not seen before.

    Raises:
        DataError: `count` is below 1.
    """
    if count < 1:
        raise DataError(f"{count} unverifiable prompts were asked for: ask for at least 1")
    generator = seeded("unverifiable", seed)
    words = InventedWords(generator)
    prompts: list[str] = []
    while len(prompts) < count:
        round_of_templates = generator.sample(_TEMPLATES, len(_TEMPLATES))
        prompts += [template.format(name=words.draw()) for template in round_of_templates]
    return tuple(prompts[:count])
