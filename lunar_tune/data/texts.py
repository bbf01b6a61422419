"""When two texts are the same: forms of Unicode, white space and case make no other question.

edge_name(" A_B\u200b ")  # "A_B"
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection

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
    """Return the names in a text, with signs between; a known name may hold signs itself.

    The longest known name comes first, so a text that is a name as a whole is that name.
    """
    parts, most = text.split(sign), 1 + max((name.count(sign) for name in known), default=0)
    names: list[str] = []
    while parts:
        beginnings = [edge_name(sign.join(parts[:n])) for n in range(1, min(most, len(parts)) + 1)]
        length = max((n for n, name in enumerate(beginnings, 1) if name in known), default=1)
        names.append(beginnings[length - 1])
        parts = parts[length:]
    return [name for name in names if name]
