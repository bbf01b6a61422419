"""The screen, bars on it, and how objects show themselves: a `repr`, a table in a notebook."""

from __future__ import annotations

import dataclasses
import html
import math
import re
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from markupsafe import Markup
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segment
from rich.table import Column
from rich.text import Text
from tabulate import tabulate

Step = TypeVar("Step")
A_DAY = 24 * 3600.0
# Columns of a terminal below which a bar is short, its name and the time elapsed left out, so that
# there is room for the note.
NARROW = 100
_WIDTH, _LINES = 100, 25
# Control characters but the end of a line, and those that embed or override a direction.
_STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LABEL, _LONGEST = 34, 120  # characters of a row's name, and of one value


class Screen(Console):
    """A console on which a text is only text, whoever wrote it; see `visible`."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield what is shown; colours and moves of the program's own are no text."""
        for one in super().render(renderable, options):
            yield one if one.control else one._replace(text=visible(one.text))


def screen(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Return the screen, on which nothing is shown if it is to be quiet."""
    return Screen(quiet=quiet, stderr=stderr, emoji=False, highlight=False)


def say(console: Console, text: str) -> None:
    """Print a line as it stands, however long it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(console: Console, text: str) -> None:
    """Print a warning."""
    console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def visible(text: str) -> str:
    """Return text with what steers a terminal or turns the direction as Python writes it."""
    return _STEERING.sub(lambda sign: repr(sign[0])[1:-1], text)


def build_progress(console: Console) -> Progress:
    """Return an empty progress display; used as a context.

    A task has a `note`, of which the end is cut off where there is no room, and may have a
    `deadline`, the moment after which no step begins.
    """
    fixed = Column(no_wrap=True, overflow="ellipsis")  # of which rich takes copies
    narrow = console.width < NARROW
    return Progress(
        TextColumn("[bold]{task.description}", table_column=fixed),
        BarColumn(bar_width=4 if narrow else 24, table_column=fixed),
        MofNCompleteColumn(table_column=fixed),
        *(() if narrow else (TimeElapsedColumn(table_column=fixed),)),
        _TimeLeftColumn(table_column=fixed),
        TextColumn(
            "{task.fields[note]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        speed_estimate_period=A_DAY,  # rich forgets steps older than that, and trials are slow
        expand=True,
        refresh_per_second=2,  # for days, perhaps over a slow line
        console=console,
        disable=console.quiet or not console.is_terminal,  # it would leave an empty line
    )


class _TimeLeftColumn(ProgressColumn):
    """Time left by the pace since the first step, whose time may hold the loading of a model."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Return it; nothing at the end."""
        if task.finished:
            return Text("")
        text, left = "…", task.time_remaining
        if left is not None:
            until = max(0.0, task.fields.get("deadline", math.inf) - time.monotonic())
            per_step = 1 / (task.speed or math.inf)  # the last step is waited for
            text = shown_duration(min(left, until + per_step))
        return Text(f"left {text}", style="progress.remaining")


def shown_duration(seconds: float) -> str:
    """Return a duration in words, no more exact than it is known: 40 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def tracked(
    steps: Iterable[Step], what: str, *, total: int, console: Console | None
) -> Iterator[Step]:
    """Yield steps and show how many are done; no console shows nothing."""
    with build_progress(console or screen(quiet=True)) as bar:
        task = bar.add_task(what, total=total, note="")
        for step in steps:
            yield step
            bar.advance(task)


def markdown(text: object) -> Markup:
    """Return a text in one line of Markdown that shows it: nothing in it is a link, markup or HTML.

    What is Markdown already (`Markup`) stays as it is.
    """
    if isinstance(text, Markup):
        return text
    escaped = re.sub(r"[\\`*\[\]]", r"\\\g<0>", _shown(str(text)))
    return Markup(escaped.replace("&", "&amp;").replace("<", "&lt;"))  # noqa: S704  # is escaped


def printable(text: str) -> str:
    """Return a text in one line, without characters that move a cursor or turn the direction."""
    return " ".join(_shown(text).split())


def encodable(text: str, console: Console) -> str:
    """Return a text in one line, with "?" for what the console's encoding has not."""
    return printable(text).encode(console.encoding, "replace").decode(console.encoding)


def _shown(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text)


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
        lines, table = self.summary()
        shown = [_cut(line, _WIDTH) for line in lines]
        rows = [(_cut(first, _LABEL), *rest) for first, *rest in table]
        text: str = tabulate(rows, (), "plain", **_columns(rows))
        return "\n".join((*shown, text))

    def _repr_html_(self) -> str:
        """Return lines and table as HTML, in which every text stands as it is."""
        lines, table = self.summary()
        shown = "<br>".join(html.escape(line) for line in lines)
        cells: Any = tabulate(table, "firstrow", "html", **_columns(table))
        return f"<div>{shown}</div>{cells}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _columns(table: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return how columns are aligned: names to the left, scores to the right."""
    return {"disable_numparse": True, "colalign": ("left", *["right"] * (len(table[0]) - 1))}
