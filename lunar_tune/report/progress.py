"""What one sees while something runs, above all a search."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from lunar_tune.display import NARROW, build_progress, shown_duration
from lunar_tune.metrics.goal import Goal, score_label
from lunar_tune.report.log_file import tell
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow, best_first, shown_score


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
    """Shows a search from its first task to its last; used as a context.

    A trial that has ended has a line, which fits 80 columns; the log has the same lines.
    """

    def __init__(self, console: Console, goal: Goal) -> None:
        self._console, self._goal, self._shown = console, goal, ExitStack()
        self._rows: list[TrialRow] = []
        self._total = self._done = self._setting_width = 0
        self._bar: Progress | None = None
        judged = ("forget_rouge1", "retain_rouge1", goal.objective.name)
        self._scores = {name: _brief_label(name) for name in judged}
        self._star = "★" if printable("★", console) == "★" else "*"

    def __enter__(self) -> SearchDisplay:
        """Begin with nothing."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the last state on the screen."""
        self._shown.close()

    def doing(self, text: str | None) -> None:
        """Show what is being done beside trials, in the place of what was shown; None ends it."""
        self._shown.close()
        if text is not None:
            self._shown.enter_context(working(self._console, text))

    def follow(
        self, num_trials: int, earlier: Sequence[TrialRow] = (), time_budget: float | None = None
    ) -> None:
        """Begin to show trials, after those of an earlier process; none starts after the budget."""
        if earlier:
            self._console.print(f"going on after {len(earlier)} trials")
        self._rows, self._total, self._done = list(earlier), num_trials, len(earlier)
        if self._console.is_terminal:
            self._bar = self._shown.enter_context(build_progress(self._console))
            self._bar.add_task(
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
            self._print(self._joined(header, names, f"{'bounds':<18}  {'time':>6}"), "bold")
        self._rows.append(row)
        self._done += not row.again
        best = best_first(self._rows)[:1] == [row]
        place = (f"{self._done}/{self._total}", row.number, row.label)
        if row.state == COMPLETE:
            scores = [shown_score(row.scores.get(name)) for name in self._scores]
            kept = self._missed(row) or ("feasible" + f" {self._star}" * best)
            seconds = row.seconds.get("trial", 0.0)
            took = f"{seconds:.1f} s" if seconds < 10 else shown_duration(seconds)
            line = self._joined(place, scores, f"{kept:<18}  {took:>6}")
        else:
            line = f"{row.state}{', runs again' * row.again}: {row.failure}"
            line = self._joined(place, [], line)
        style = "green" if best else "red" if row.state == FAILED else ""
        self._print(line, style, whole=row.state != COMPLETE)
        if self._bar is not None:
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


def printable(text: str, console: Console) -> str:
    """Return a text in one line, with "?" for what the console's encoding has not.

    A model may answer with anything, characters that move a terminal's cursor among it.
    """
    line = "".join(one if one.isprintable() else " " for one in text)
    return " ".join(line.split()).encode(console.encoding, "replace").decode(console.encoding)
