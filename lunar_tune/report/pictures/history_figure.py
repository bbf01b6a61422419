"""How the search went: scores and the best feasible one so far, over trials and over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lunar_tune.metrics.names import Metric
from lunar_tune.report.axes import time_axis
from lunar_tune.report.pictures.annotations import draw_trials, metrics_of, show_scores, shown_rows
from lunar_tune.report.pictures.figure import BEST, Canvas, make_figure, show_legend
from lunar_tune.report.report import Report
from lunar_tune.study.rows import FAILED, TrialRow, best_so_far

__all__ = ["history"]


def history(report: Report) -> Canvas:
    """Draw the objective of every trial and the best feasible one so far."""
    figure, (by_number, by_time) = make_figure(report.title, columns=2, width=8.4, height=4.4)
    metric, _ = metrics_of(report)
    rows = shown_rows(report, metric.name)
    show_scores(by_number, metric, [row.scores[metric.name] for row in rows], along="y")
    _draw(by_number, rows, metric, lambda row: float(row.number))
    failed = [row.number for row in report.rows if row.counts and row.state == FAILED]
    if failed:
        by_number.plot(
            failed,
            [0.0] * len(failed),
            transform=by_number.get_xaxis_transform(),
            ls="",
            marker="^",
            ms=5,
            clip_on=False,
            color="black",
            label=f"failed ({len(failed)})",
        )
    by_number.set_xlabel("trial (from 0)", fontsize=9)
    by_number.set_xlim(-0.6, max(len(report.rows), 1) - 0.4)
    by_number.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _draw_over_time(by_time, report, rows, metric)
    show_legend(figure)
    return figure


def _draw_over_time(axes: Axes, report: Report, rows: Sequence[TrialRow], metric: Metric) -> None:
    time = time_axis(rows, report.rows)
    if time.places:
        by_number = {row.number: row for row in rows}
        timed = [by_number[number] for number in time.places]
        _draw(axes, timed, metric, lambda row: time.places[row.number])
        axes.set_xlim(0, max(time.places.values()) * 1.03 or 1.0)
    axes.set_xlabel(f"{time.unit} since the first trial began", fontsize=9)


def _draw(
    axes: Axes,
    rows: Sequence[TrialRow],
    metric: Metric,
    place: Callable[[TrialRow], float],
) -> None:
    """Draw the trials and the best so far, in the order of the rows, up to the last of them."""
    draw_trials(axes, rows, place, lambda row: row.scores[metric.name], size=24)
    best = best_so_far(rows)
    if best:
        places = [place(row) for row, _ in best]
        scores = [one.scores[metric.name] for _, one in best]
        axes.step(
            places, scores, where="post", color=BEST, lw=2, label="best feasible so far", zorder=3
        )
