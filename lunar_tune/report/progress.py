"""Progress bars, the same in every command, and what one sees while a search runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

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

from lunar_tune.report.log_file import tell
from lunar_tune.study.rows import COMPLETE, FAILED, HEADLINE_SCORES, TrialRow, best_first

__all__ = ["SearchDisplay", "build_progress", "tiny_progress", "working"]

A_DAY = 24 * 3600.0
# Columns of a terminal below which the bar is short and time elapsed is left out, so that there is
# room for the note; and those from which on the note has whole words.
_NARROW, _ROOMY = 100, 110


def build_progress(console: Console) -> Progress:
    """Return an empty progress display; used as a context.

    A task has a `note`, of which the end is cut off where there is no room, and may have `left`, a
    function that gives the seconds left or None.
    """
    fixed = Column(no_wrap=True, overflow="ellipsis")  # of which rich takes copies
    narrow = console.width < _NARROW
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


@contextmanager
def working(console: Console, text: str) -> Iterator[Callable[[str | None], None]]:
    """Inside, say what is going on: a moving line on a terminal, a line each time elsewhere.

    Yields what is to be called when something else is going on, or nothing any more (None).
    """
    with ExitStack() as shown:

        def doing(what: str | None) -> None:
            shown.close()
            if what is not None:
                tell(console, what)
            if what is not None and console.is_terminal:
                shown.enter_context(console.status(what))

        doing(text)
        yield doing


class SearchDisplay:
    """Shows a search from its first task to its last; used as a context."""

    def __init__(self, console: Console) -> None:
        self._console, self._shown = console, ExitStack()
        self._rows: list[TrialRow] = []
        self._total = self._done = 0
        self._left = TimeLeft(0)
        self._bar: Progress | None = None
        self._roomy = console.width >= _ROOMY

    def __enter__(self) -> SearchDisplay:
        """Begin with nothing."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the last state on the screen."""
        self._shown.close()

    def doing(self, text: str | None) -> None:
        """Show what is being done beside trials, in the place of what was shown; None ends it."""
        self._shown.close()
        if text is None:
            return
        tell(self._console, text)
        if self._console.is_terminal:
            self._shown.enter_context(self._console.status(text))

    def follow(
        self, num_trials: int, earlier: Sequence[TrialRow] = (), time_budget: float | None = None
    ) -> None:
        """Begin to show trials, after those of an earlier process."""
        if earlier:
            self._console.print(f"going on after {len(earlier)} trials")
        self._rows, self._total, self._done = list(earlier), num_trials, len(earlier)
        self._left = TimeLeft(num_trials, done=self._done, budget=time_budget)
        if self._console.is_terminal:
            self._bar = self._shown.enter_context(build_progress(self._console))
            self._bar.add_task(
                "trials" if self._roomy else "",  # a setting is shown whole before a word
                total=num_trials,
                completed=self._done,
                note=self._note() if earlier else "",
                left=self._left,
            )

    def ended(self, row: TrialRow) -> None:
        """Take note of an ended trial."""
        self._rows.append(row)
        if not row.again:
            self._done += 1
            self._left.ended()
        tell(self._console, self._line(row))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, note=self._note())

    def _best(self, *, brief: bool = False) -> str:
        best = best_first(self._rows)
        if not best:
            return "none feasible yet"
        label = best[0].label
        forget, retain = (f"{best[0].scores[name]:.3f}" for name in HEADLINE_SCORES[:2])
        if brief:
            return f"forget {forget} retain {retain} {label}"
        return f"best forget {forget} at retain {retain} ({label})"

    def _failures(self) -> str:
        failed = sum(row.state == FAILED for row in self._rows)
        return f"{failed} failed" if failed else ""

    def _note(self) -> str:
        """Return what stands beside the bar, the most important first: the end may be cut off."""
        return " · ".join(filter(None, (self._failures(), self._best(brief=not self._roomy))))

    def _line(self, row: TrialRow) -> str:
        if row.state == COMPLETE:
            outcome = (
                f"forget {row.scores['forget_rouge1']:.3f}  retain "
                f"{row.scores['retain_rouge1']:.3f}  "
                f"{'feasible' if row.feasible else 'infeasible'}"
            )
        else:
            outcome = f"{row.state}{', runs again' if row.again else ''}: {row.failure}"
        best = " · ".join(filter(None, (self._best(), self._failures())))
        left = self._left()
        time_left = f"  |  about {shown_duration(left)} left" if left else ""
        done = f"{self._done}/{self._total}"
        return f"{done}  trial {row.number}  {row.label}  {outcome}  |  {best}{time_left}"


class TimeLeft:
    """How long the trials will still take; `budget` are seconds after which no trial starts.

    The first trial here tells nothing: its time may hold the loading of a model.
    """

    def __init__(self, total: int, *, done: int = 0, budget: float | None = None) -> None:
        self._left, self._here = max(0, total - done), 0
        self._first = self._last = time.monotonic()
        self._deadline = math.inf if budget is None else self._first + budget

    def ended(self) -> None:
        """Take note that a trial has ended."""
        self._left, self._here = max(0, self._left - 1), self._here + 1
        self._last = time.monotonic()
        if self._here == 1:
            self._first = self._last

    def __call__(self) -> float | None:
        """Return seconds from now on; None where that cannot be told yet."""
        if not self._left:
            return 0.0
        if self._here < 2:
            return None
        now, per_trial = time.monotonic(), (self._last - self._first) / (self._here - 1)
        left = self._left * per_trial - (now - self._last)
        until_deadline = max(0.0, self._deadline - now) + per_trial  # the last trial is waited for
        return max(0.0, min(left, until_deadline))
