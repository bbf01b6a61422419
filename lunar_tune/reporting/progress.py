"""The look of a progress bar, the same in every command.

Covers: rich's bar with what is done, elapsed and left; hidden when quiet.
Does not cover: what is counted.
"""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["build_progress", "epochs_shown"]

A_DAY = 24 * 3600.0


def build_progress(console: Console) -> Progress:
    """Return an empty progress display; used as a context."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        speed_estimate_period=A_DAY,  # rich forgets steps older than that, and trials are slow
        console=console,
        disable=console.quiet,
    )


def epochs_shown(bar: Progress, description: str) -> Callable[[int, int], None]:
    """Return a callback that shows epochs done of epochs in all, from its first call on."""

    def on_progress(done: int, total: int) -> None:
        if not bar.tasks:
            bar.add_task(description, total=total, note="")
        bar.update(bar.tasks[0].id, completed=done, total=total)

    return on_progress
