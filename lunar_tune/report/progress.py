"""Progress bars, the same in every command, and what one sees while a search runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from lunar_tune.metrics.goal import Goal, score_label
from lunar_tune.report.log_file import tell
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow, best_first, shown_score

__all__ = ["SearchDisplay", "build_progress", "printable", "tiny_progress"]

A_DAY = 24 * 3600.0
# Columns of a terminal below which the bar is short, its name and the time elapsed left out, so
# that there is room for the note.
_NARROW = 100


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


class TrialLines:
    """A line for every ended trial, in columns that fit a terminal of 80; the log has the same."""

    def __init__(self, goal: Goal, total: int, *, star: str = "★") -> None:
        self._goal, self._total, self._star = goal, total, star
        judged = ("forget_rouge1", "retain_rouge1", goal.objective.name)
        self.scores = {name: brief_label(name) for name in judged}
        """The scores that are shown, and what they are called in short."""
        self._setting = 0

    def header(self, first: TrialRow) -> str:
        """Return what stands above the columns, and make room for settings like the first."""
        # A number has up to eight characters with its name; a layer, which most have, has three.
        self._setting = max(len(first.label), min(8 * len(first.parameters), 19))
        place = ("done", "trial", "setting")
        return self._joined(place, self.scores.values(), "bounds", "time")

    def line(self, row: TrialRow, done: int, *, best: bool) -> str:
        """Return the line of a trial, the last of `done`; `best` is the best of them so far."""
        place = (f"{done}/{self._total}", str(row.number), row.label)
        if row.state != COMPLETE:
            said = f"{row.state}{', runs again' if row.again else ''}: {row.failure}"
            return self._joined(place, (), said)
        kept = self._missed(row) or ("feasible" + f" {self._star}" * best)
        scores = [shown_score(row.scores.get(name)) for name in self.scores]
        seconds = row.seconds.get("trial", 0.0)
        time = f"{seconds:.1f} s" if seconds < 10 else shown_duration(seconds)
        return self._joined(place, scores, kept, time)

    def _missed(self, row: TrialRow) -> str:
        """Return which bound is missed most, and by how much; empty where all are kept."""
        missed = [(one.violation(row.scores), one) for one in self._goal.missed(row.scores)]
        if not missed:
            return ""
        by, one = max(missed, key=lambda pair: pair[0])
        where = "below" if one.sense == ">=" else "above"
        how = f"{shown_score(by)} {where}" if math.isfinite(by) else "not measured"
        return f"{brief_label(one.metric)} {how}" + " …" * (len(missed) > 1)

    def _joined(self, place: tuple[str, str, str], scores: Iterable[str], *rest: str) -> str:
        done, number, setting = place
        self._setting = max(self._setting, len(setting))
        cells = [f"{done:<{2 * len(str(self._total)) + 1}}", f"{number:>5}"]
        cells.append(f"{setting:<{self._setting}}")
        widths = (max(6, len(name)) for name in self.scores.values())
        cells += [f"{score:>{width}}" for score, width in zip(scores, widths, strict=False)]
        cells += [f"{text:{width}}" for text, width in zip(rest, ("<18", ">6"), strict=False)]
        return "  ".join(cells).rstrip()


def brief_label(metric: str) -> str:
    """Return what a score is called where there is little room: of ROUGE-1 the set alone."""
    return score_label(metric).removesuffix(" ROUGE-1")


class SearchDisplay:
    """Shows a search from its first task to its last; used as a context."""

    def __init__(self, console: Console, goal: Goal) -> None:
        self._console, self._goal, self._shown = console, goal, ExitStack()
        self._rows: list[TrialRow] = []
        self._lines = TrialLines(goal, 0)
        self._done, self._headed = 0, False
        self._left = TimeLeft(0)
        self._bar: Progress | None = None

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
        self._rows, self._done = list(earlier), len(earlier)
        star = printable("★", self._console)
        self._lines = TrialLines(self._goal, num_trials, star="*" if star == "?" else star)
        self._left = TimeLeft(num_trials, done=self._done, budget=time_budget)
        if self._console.is_terminal:
            self._bar = self._shown.enter_context(build_progress(self._console))
            self._bar.add_task(
                "trials" if self._console.width >= _NARROW else "",
                total=num_trials,
                completed=self._done,
                note=self._note() if earlier else "",
                left=self._left,
            )

    def ended(self, row: TrialRow) -> None:
        """Print the line of an ended trial, which stays above what moves."""
        if not self._headed:
            self._print(self._lines.header(row), "bold")
            self._headed = True
        self._rows.append(row)
        if not row.again:
            self._done += 1
            self._left.ended()
        best = best_first(self._rows)[:1] == [row]
        line = self._lines.line(row, self._done, best=best)
        style = "green" if best else "red" if row.state == FAILED else ""
        self._print(line, style, whole=row.state != COMPLETE)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, note=self._note())

    def _print(self, line: str, style: str, *, whole: bool = False) -> None:
        """Print a line, cut at a terminal's edge unless it is to be read `whole`."""
        cut = self._console.is_terminal and not whole
        text = Text(line, style, no_wrap=cut or None, overflow="ellipsis" if cut else None)
        self._console.print(text, soft_wrap=not self._console.is_terminal)

    def _note(self) -> str:
        """Return what stands beside the bar: the end may be cut off."""
        failed = sum(row.state == FAILED for row in self._rows)
        best = next(iter(best_first(self._rows)), None)
        found = "none feasible yet"
        if best is not None:
            names = self._lines.scores.items()
            scores = [f"{name} {shown_score(best.scores.get(score))}" for score, name in names]
            found = f"best trial {best.number}: {', '.join(scores)}"
        return f"{failed} failed · {found}" if failed else found


def printable(text: str, console: Console) -> str:
    """Return a text in one line, with "?" for what the console's encoding has not.

    A model may answer with anything, characters that move a terminal's cursor among it.
    """
    line = "".join(one if one.isprintable() else " " for one in text)
    return " ".join(line.split()).encode(console.encoding, "replace").decode(console.encoding)


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
