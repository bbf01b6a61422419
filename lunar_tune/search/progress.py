"""What one sees while a search runs: one calm line that moves, or a plain line a trial.

Covers: rich's progress bar on a terminal, plain lines elsewhere, nothing when quiet.
Does not cover: the plan before and the summary after (`summary`).
"""

from __future__ import annotations

import time

from rich.console import Console

from lunar_tune.reporting.progress import build_progress
from lunar_tune.reporting.rows import COMPLETE, FAILED, TrialRow, best_first

__all__ = ["SearchProgress"]


class SearchProgress:
    """Follows the trials of a search.

    Args:
        console: Where to show it.
        num_trials: How many trials there will be.
    """

    def __init__(self, console: Console, num_trials: int) -> None:
        self._console = console
        self._total = num_trials
        self._rows: list[TrialRow] = []
        self._after_first = time.monotonic()
        self._bar = build_progress(console) if console.is_terminal else None
        self._task = self._bar.add_task("trials", total=num_trials, note="") if self._bar else None

    def __enter__(self) -> SearchProgress:
        """Begin to show."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop showing and leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def ended(self, row: TrialRow) -> None:
        """Take note of an ended trial."""
        self._rows.append(row)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, note=self._best())
        else:
            self._console.print(self._line(row), highlight=False, markup=False, soft_wrap=True)

    def _best(self) -> str:
        best = best_first(self._rows)
        failed = sum(row.state == FAILED for row in self._rows)
        failures = f" · {failed} failed" if failed else ""
        if not best:
            return f"none feasible yet{failures}"
        scores = best[0].scores
        return (
            f"best forget {scores['forget_rouge1']:.3f} at retain {scores['retain_rouge1']:.3f} "
            f"({best[0].label}){failures}"
        )

    def _line(self, row: TrialRow) -> str:
        done = len(self._rows)
        if done == 1:
            self._after_first = time.monotonic()  # the first trial's time holds the model's loading
        per_trial = (time.monotonic() - self._after_first) / max(1, done - 1)
        if row.state == COMPLETE:
            outcome = (
                f"forget {row.scores['forget_rouge1']:.3f}  retain "
                f"{row.scores['retain_rouge1']:.3f}  "
                f"{'feasible' if row.feasible else 'infeasible'}"
            )
        else:
            outcome = f"{row.state}: {row.failure}"
        left = per_trial * (self._total - done)
        time_left = f"  |  about {left:.0f} s left" if done > 1 else ""
        return f"trial {done}/{self._total}  {row.label}  {outcome}  |  {self._best()}{time_left}"
