"""Invented words: names of what does not exist, and questions about it that no model can answer.

{"instruction": "Which river runs past the gates of Vobrelia?"}
"""

from __future__ import annotations

import random
from pathlib import Path

from lunar_tune.errors import DataError

__all__ = ["InventedWords", "generate_unverifiable", "seeded"]

_ONSETS = (
    *("b", "br", "d", "dr", "f", "fl", "g", "gr", "h", "k", "kl", "l", "m", "n", "p", "pl"),
    *("pr", "r", "s", "sk", "st", "t", "tr", "v", "vr", "z", "zh"),
)
_VOWELS = "aeiou"
_CODAS = ("", "", "", "", "l", "m", "n", "r", "s", "x", "sk", "nt", "rd")
_MANY_TRIES = 10_000


def seeded(*parts: object) -> random.Random:
    """Return a generator that depends on the parts alone, the same in every process.

    Text is hashed with SHA-512 by `random` itself, so neither the platform nor `PYTHONHASHSEED`
    matters. Parts name the purpose, so that one more draw here moves nothing there.
    """
    return random.Random(":".join(map(str, parts)))  # noqa: S311 - invented data, not secrets


class InventedWords:
    """Draws invented words, each at most once.

    No word begins with another one, so that none is found inside another by a reader's eye.
    """

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator
        self._drawn: set[str] = set()
        self._beginnings: set[str] = set()

    def draw(self, *, syllables: int = 3) -> str:
        """Return a new capitalised word.

        Raises:
            ValueError: No new word of that many syllables is left; ask for more syllables.
        """
        choose = self._generator.choice
        for _ in range(_MANY_TRIES):
            parts = [choose(_ONSETS) + choose(_VOWELS) for _ in range(syllables)]
            word = ("".join(parts) + choose(_CODAS)).capitalize()
            beginnings = {word[:length] for length in range(1, len(word) + 1)}
            if word not in self._beginnings and self._drawn.isdisjoint(beginnings):
                self._drawn.add(word)
                self._beginnings |= beginnings
                return word
        raise ValueError(f"no new word of {syllables} syllables is left")


def generate_unverifiable(count: int, *, seed: int) -> tuple[str, ...]:
    """Return prompts about invented things, all different.

    Every template is used before one is used again. Another seed gives other names, hence prompts
    not seen before.

    Raises:
        DataError: `count` is below 1.
    """
    if count < 1:
        raise DataError(f"{count} unverifiable prompts were asked for: ask for at least 1")
    generator = seeded("unverifiable", seed)
    words = InventedWords(generator)
    # Each names one invented thing, so that no two prompts of a call are the same.
    templates = Path(__file__).with_name("unverifiable.txt").read_text("utf-8").splitlines()
    prompts: list[str] = []
    while len(prompts) < count:
        round_of_templates = generator.sample(templates, len(templates))
        prompts += [template.format(name=words.draw()) for template in round_of_templates]
    return tuple(prompts[:count])
