"""The look of a progress bar, the same in every command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

__all__ = ["build_progress", "shown_duration", "tiny_progress"]

A_DAY = 24 * 3600.0
# Columns of a terminal below which the bar is short and time elapsed is left out, so that there is
# room for the note.
_NARROW = 100


def build_progress(console: Console) -> Progress:
    """Return an empty progress display; used as a context.

    A task has a `note`, of which the end is cut off where there is no room, and may have `left`, a
    function that gives the seconds left or None.
    """

    def fixed() -> Column:
        return Column(no_wrap=True, overflow="ellipsis")

    narrow = console.width < _NARROW
    return Progress(
        TextColumn("[bold]{task.description}", table_column=fixed()),
        BarColumn(bar_width=4 if narrow else 24, table_column=fixed()),
        MofNCompleteColumn(table_column=fixed()),
        *(() if narrow else (TimeElapsedColumn(table_column=fixed()),)),
        _TimeLeftColumn(table_column=fixed()),
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
    """Time left, as the task says it or as rich reckons it."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Return it; nothing at the end."""
        if task.finished:
            return Text("")
        left = task.fields["left"]() if "left" in task.fields else task.time_remaining
        text = "…" if left is None else shown_duration(left)
        return Text(f"left {text}", style="progress.remaining")


def shown_duration(seconds: float) -> str:
    """Return a duration in words, no more exact than it is known: 40 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def tiny_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Inside, epochs of building `tiny` are shown; yields what is to be called with done and all.

    Nothing is shown before its first call.
    """
    with build_progress(console) as bar:

        def on_progress(done: int, total: int) -> None:
            if not bar.tasks:
                bar.add_task("building the tiny model (once)", total=total, note="")
            bar.update(bar.tasks[0].id, completed=done, total=total)

        yield on_progress
