"""The screen, and how objects show themselves: a `repr` that fits it, a table in a notebook."""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

_WIDTH, _LINES = 100, 25
_LABEL, _LONGEST = 34, 120  # characters of a row's name, and of one value


def screen(*, quiet: bool = False) -> Console:
    """Return the screen, on which nothing is shown if it is to be quiet."""
    return Console(quiet=quiet, emoji=False, highlight=False)


def warn(console: Console, text: str) -> None:
    """Print a warning."""
    console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


class Concise:
    """A dataclass whose `repr` leaves out what is at its default, and cuts what is long."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Return type, fields and values, in as many lines as a screen has room for."""
        shown: Any = self  # a dataclass
        values = ((one, getattr(self, one.name)) for one in dataclasses.fields(shown) if one.repr)
        parts = [
            f"{field.name}={_cut(repr(value), _LONGEST)}"
            for field, value in values
            if value is not field.default and value != field.default
        ]
        text = f"{type(self).__name__}({', '.join(parts)})"
        return textwrap.fill(text, _WIDTH, subsequent_indent="  ", max_lines=_LINES)


class Summary:
    """Shows itself as a few lines and a table of scores, as text or as HTML."""

    __slots__ = ()

    def summary(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Return the lines, and the table with its header first."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return lines and table as text."""
        from tabulate import tabulate

        lines, table = self.summary()
        shown = [_cut(line, _WIDTH) for line in lines]
        rows = [(_cut(first, _LABEL), *rest) for first, *rest in table]
        text: str = tabulate(rows, (), "plain", **_columns(rows))
        return "\n".join((*shown, text))

    def _repr_html_(self) -> str:
        """Return lines and table as HTML, in which every text stands as it is."""
        from tabulate import tabulate

        lines, table = self.summary()
        shown = "<br>".join(html.escape(line) for line in lines)
        cells: Any = tabulate(table, "firstrow", "html", **_columns(table))
        return f"<div>{shown}</div>{cells}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _columns(table: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return how columns are aligned: names to the left, scores to the right."""
    return {"disable_numparse": True, "colalign": ("left", *["right"] * (len(table[0]) - 1))}
