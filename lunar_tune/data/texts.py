"""When two texts are the same: forms of Unicode, white space and case make no other question.

edge_name(" A_B\u200b ")  # "A_B"
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection

# Which of these stands in a text depends on where it was typed.
_QUOTES = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}


def composed(text: str) -> str:
    """Return a text in Unicode's form NFC, in which an accented letter is one character."""
    return unicodedata.normalize("NFC", text)


def edge_name(text: str) -> str:
    """Return the name of an edge or a group: composed, visible, with single spaces inside."""
    text = composed(text)
    if not text.isascii():
        text = "".join(sign for sign in text if unicodedata.category(sign) != "Cf")
    return " ".join(text.split())


def normalised(text: str) -> str:
    """Return what makes a question or an answer the same: all but white space, case and form."""
    return composed(edge_name(text).translate(_QUOTES).casefold())


def names_in(text: str, known: Collection[str], sign: str = ",") -> list[str]:
    """Return the names in a text, with signs between; a known name may hold signs itself."""
    most = 1 + max((name.count(sign) for name in known), default=0)
    parts = divided(text, lambda part: edge_name(part) in known, sign, most)
    return [name for name in map(edge_name, parts) if name]


def divided(
    text: str, is_known: Callable[[str], bool], sign: str = ",", most: int | None = None
) -> list[str]:
    """Return the parts of a text with signs between, the longest that is known first.

    So a text that is known as a whole is not divided. No part holds more than `most` - 1 signs.
    """
    parts, found = text.split(sign), list[str]()
    while parts:
        lengths = range(min(most or len(parts), len(parts)), 1, -1)
        length = next((n for n in lengths if is_known(sign.join(parts[:n]))), 1)
        found.append(sign.join(parts[:length]))
        parts = parts[length:]
    return found
