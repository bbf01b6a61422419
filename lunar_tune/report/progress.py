"""What one sees while something runs, above all a search, and its log: `search.log` in its folder.

2026-11-25 13:08:02+0000 INFO    trial 3/30  L14 c2.0 lr0.003  forget 0.041  …
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.text import Text

from lunar_tune.display import NARROW, Screen, build_progress, encodable, shown_duration
from lunar_tune.metrics.goal import Goal, score_label
from lunar_tune.secrets import SecretsFormatter
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow, best_first, shown_score

RECORD = logging.getLogger("lunar_tune.record")
"""For the log alone: while one is open, nothing of it reaches the screen."""

# Loggers of libraries that keep their records from the root.
_APART = ("ray", "optuna", "mlflow", "transformers", "peft", "alembic", "sqlalchemy")
_WIDE = 10_000  # no line is broken


def tell(console: Console, line: str) -> None:
    """Print a line; on a terminal, where a display that moves shows the same, only log it."""
    if console.is_terminal:
        RECORD.info("%s", line)
    else:
        console.print(line, markup=False, soft_wrap=True)


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
                if console.is_terminal:
                    shown.enter_context(console.status(Text(what)))

        doing(text)
        yield doing


class SearchDisplay(ExitStack):
    """Shows a search, used as a context; a trial that has ended has a line of 80 columns."""

    def __init__(self, console: Console, goal: Goal) -> None:
        super().__init__()
        self._console, self._goal = console, goal
        self._rows: list[TrialRow] = []
        self._total = self._done = self._setting_width = 0
        self._bar = build_progress(console)
        judged = ("forget_rouge1", "retain_rouge1", goal.objective.name)
        self._scores = {name: _brief_label(name) for name in judged}
        self._star = "★" if encodable("★", console) == "★" else "*"

    def doing(self, text: str | None) -> None:
        """Show what is being done beside trials, in the place of what was shown; None ends it."""
        for task in self._bar.task_ids:  # there may have been fewer trials than were allowed
            self._bar.update(task, total=self._done)
        self.close()
        if text is not None:
            self.enter_context(working(self._console, text))

    def follow(
        self, num_trials: int, earlier: Sequence[TrialRow] = (), time_budget: float | None = None
    ) -> None:
        """Begin to show trials, after those of an earlier process; none starts after the budget."""
        if earlier:
            self._console.print(f"resuming after {len(earlier)} trials")
        self._rows, self._total, self._done = list(earlier), num_trials, len(earlier)
        self.enter_context(self._bar).add_task(
            "trials" if self._console.width >= NARROW else "",
            total=num_trials,
            completed=self._done,
            note=self._note() if earlier else "",
            deadline=math.inf if time_budget is None else time.monotonic() + time_budget,
        )

    def ended(self, row: TrialRow) -> None:
        """Print the line of an ended trial, which stays above what moves."""
        if not self._setting_width:
            # A number has up to nine characters with its name; a layer, which most have, three.
            self._setting_width = max(len(row.label), min(9 * len(row.parameters), 20))
            header, names = ("done", "trial", "setting"), [*self._scores.values()]
            self._print(self._joined(header, names, f"{'constraints':<18}  {'time':>6}"), "bold")
        self._rows.append(row)
        self._done += not row.again
        best = best_first(self._rows)[:1] == [row]
        place = (f"{self._done}/{self._total}", row.number, row.label)
        if row.state == COMPLETE:
            scores = [shown_score(row.scores.get(name)) for name in self._scores]
            kept = self._missed(row) or ("feasible" + f" {self._star}" * best + self._margin(row))
            seconds = row.seconds.get("trial", 0.0)
            took = f"{seconds:.1f} s" if seconds < 10 else shown_duration(seconds)
            line = self._joined(place, scores, f"{kept} {took.rjust(25 - len(kept))}")
        else:
            line = f"{row.state}{', runs again' * row.again}: {row.failure}"
            line = self._joined(place, [], line)
        style = "green" if best else "red" if row.state == FAILED else ""
        self._print(line, style, whole=row.state != COMPLETE)
        self._bar.update(self._bar.task_ids[0], completed=self._done, note=self._note())

    def _joined(self, place: tuple[str, object, str], scores: Sequence[str], rest: str) -> str:
        done, number, setting = place
        self._setting_width = max(self._setting_width, len(setting))
        cells = [f"{done:<{2 * len(str(self._total)) + 1}}", f"{number:>5}"]
        cells.append(f"{setting:<{self._setting_width}}")
        widths = (max(6, len(name)) for name in self._scores.values())
        cells += [f"{score:>{width}}" for score, width in zip(scores, widths, strict=False)]
        return "  ".join([*cells, rest])

    def _missed(self, row: TrialRow) -> str:
        """Return which bound is missed most, and by how much; empty where all are kept."""
        missed = sorted(self._goal.missed(row.scores), key=lambda one: -one.violation(row.scores))
        for one in missed[:1]:
            by, where = one.violation(row.scores), "below" if one.sense == ">=" else "above"
            how = f"{shown_score(by)} {where}" if math.isfinite(by) else "not measured"
            return f"{_brief_label(one.metric)} {how}" + " …" * (len(missed) > 1)
        return ""

    def _margin(self, row: TrialRow) -> str:
        """Return by how many standard errors a bound is kept if that is less than one."""
        return next(
            (f" by {one:.1f} se" for one in self._goal.barely_kept(row.scores).values()), ""
        )

    def _print(self, line: str, style: str, *, whole: bool = False) -> None:
        """Print a line, cut at a terminal's edge unless it is to be read `whole`."""
        cut = self._console.is_terminal and not whole
        text = Text(line, style, no_wrap=cut or None, overflow="ellipsis" if cut else None)
        self._console.print(text, soft_wrap=not self._console.is_terminal)

    def _note(self) -> str:
        """Return what stands beside the bar: the end may be cut off."""
        failed = sum(row.state == FAILED for row in self._rows)
        found = "none feasible yet"
        for best in best_first(self._rows)[:1]:
            names = self._scores.items()
            scores = [f"{name} {shown_score(best.scores.get(score))}" for score, name in names]
            found = f"best trial {best.number}: {', '.join(scores)}"
        return f"{failed} failed · {found}" if failed else found


def _brief_label(metric: str) -> str:
    """Return what a score is called where there is little room: of ROUGE-1 the set alone."""
    return score_label(metric).removesuffix(" ROUGE-1")


@contextmanager
def search_log(path: Path, console: Console, opening: Sequence[str] = ()) -> Iterator[None]:
    """Inside, a log is written, `opening` its first lines; one that is there is gone on with.

    What is printed on the console is logged too, also when it is quiet, and what ends the search.
    """
    handler = _FileHandler(path, encoding="utf-8", errors="replace")
    loggers = [logging.getLogger(name) for name in (*_APART, RECORD.name, None)]
    level, propagate = RECORD.level, RECORD.propagate
    console.push_render_hook(_Printed())  # below those of displays, which come and go
    try:
        RECORD.setLevel(logging.INFO)
        RECORD.propagate = False
        for logger in loggers:
            logger.addHandler(handler)
        logging.captureWarnings(True)
        for line in opening:
            RECORD.info("%s", line)
        yield
    except KeyboardInterrupt:
        RECORD.warning("interrupted")
        raise
    except BaseException:
        RECORD.exception("ended by an error")
        raise
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)
        RECORD.setLevel(level)
        RECORD.propagate = propagate
        console.pop_render_hook()
        with suppress(OSError):  # what could not be written cannot be now
            handler.close()


class _FileHandler(logging.FileHandler):
    """Writes records without secrets, in a form of its own; a full disk ends no search."""

    _form = SecretsFormatter(
        "%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S%z"
    )

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as it is written; Ray gives every handler a formatter of its own."""
        return self._form.format(record).rstrip()

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a record pass once, though it may come from its library's logger and the root."""
        wanted = record.name == RECORD.name or record.levelno >= logging.WARNING
        again = getattr(record, "in_search_log", False)
        record.in_search_log = True
        return wanted and not again

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: it would be said again with every line."""


class _Printed(RenderHook):
    """Hears of everything that is printed on a console."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Log what is printed, line by line, and change nothing of it."""
        text = io.StringIO()
        plain = Screen(
            file=text,
            width=_WIDE,
            color_system=None,
            force_terminal=False,
            force_jupyter=False,  # else a notebook shows it
            emoji=False,
        )
        for one in renderables:
            if not isinstance(one, Control):  # of which a display that moves prints nothing else
                plain.print(one, soft_wrap=True, highlight=False)
        for line in filter(str.strip, text.getvalue().splitlines()):
            RECORD.info("%s", line.rstrip())
        return renderables
