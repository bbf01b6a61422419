"""Invented, pronounceable words: names of things and people that do not exist."""

from __future__ import annotations

import random

__all__ = ["InventedWords", "seeded"]

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

    Args:
        generator: Where the randomness comes from.
    """

    def __init__(self, generator: random.Random) -> None:
        """Start with no word drawn."""
        self._generator = generator
        self._drawn: set[str] = set()
        self._beginnings: set[str] = set()

    def draw(self, *, syllables: int = 3) -> str:
        """Return a new capitalised word.

        Raises:
            ValueError: No new word of that many syllables is left; ask for more syllables.
        """
        for _ in range(_MANY_TRIES):
            word = self._one(syllables)
            if not self._clashes(word):
                self._drawn.add(word)
                self._beginnings.update(_beginnings(word))
                return word
        raise ValueError(f"no new word of {syllables} syllables is left")

    def _one(self, syllables: int) -> str:
        choose = self._generator.choice
        parts = [choose(_ONSETS) + choose(_VOWELS) for _ in range(syllables)]
        return ("".join(parts) + choose(_CODAS)).capitalize()

    def _clashes(self, word: str) -> bool:
        return word in self._beginnings or not self._drawn.isdisjoint(_beginnings(word))


def _beginnings(word: str) -> list[str]:
    return [word[:length] for length in range(1, len(word) + 1)]
