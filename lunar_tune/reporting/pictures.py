"""Pictures of a search, drawn with matplotlib.

Covers: forget against retain with the floor, and the best feasible score over the trials.
Does not cover: interactive pictures.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.evaluation.goal import score_label
from lunar_tune.evaluation.metrics import METRICS
from lunar_tune.files import write_atomically
from lunar_tune.reporting.report import Report
from lunar_tune.reporting.rows import COMPLETE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_history", "draw_trade_off"]

# Okabe and Ito's palette: told apart by the colour-blind; markers tell apart in grey.
_FEASIBLE, _INFEASIBLE, _BEST = "#0072B2", "#D55E00", "#009E73"
_WIDTH, _HEIGHT, _DPI = 6.4, 4.4, 120


def draw_trade_off(report: Report, path: Path) -> None:
    """Draw every trial's forget against retain ROUGE-1, with the floor and the best."""
    with _picture(path) as axes:
        floor = report.goal.floor
        if floor is not None:
            axes.axhspan(floor, 1.02, color=_FEASIBLE, alpha=0.08, lw=0)
            axes.axhline(floor, color="0.4", lw=1, ls="--")
            axes.text(0.01, floor + 0.01, "feasible", color="0.35", fontsize=8)
        complete = [row for row in report.rows if row.state == COMPLETE]
        for feasible, colour, marker in ((True, _FEASIBLE, "o"), (False, _INFEASIBLE, "x")):
            mine = [row for row in complete if row.feasible is feasible]
            axes.scatter(
                [row.scores["forget_rouge1"] for row in mine],
                [row.scores["retain_rouge1"] for row in mine],
                s=36,
                c=colour,
                marker=marker,
                label=f"{'feasible' if feasible else 'infeasible'} ({len(mine)})",
                clip_on=False,
            )
        _mark(axes, report)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_title(report.title, parse_math=False, fontsize=10)
        axes.set_xlabel("forget ROUGE-1 recall (lower is better)")
        axes.set_ylabel("retain ROUGE-1 recall (higher is better)")
        axes.legend(loc="lower right", fontsize=8, frameon=False)


def draw_history(report: Report, path: Path) -> None:
    """Draw the best feasible score so far over the trials."""
    metric = METRICS[report.goal.objective.metric]
    better = min if metric.lower_is_better else max
    with _picture(path) as axes:
        complete = [row for row in report.rows if row.state == COMPLETE]
        for feasible, colour, marker in ((True, _FEASIBLE, "o"), (False, _INFEASIBLE, "x")):
            mine = [row for row in complete if row.feasible is feasible]
            axes.scatter(
                [row.number + 1 for row in mine],
                [row.scores[metric.name] for row in mine],
                s=24,
                c=colour,
                marker=marker,
                label="feasible" if feasible else "infeasible",
                clip_on=False,
            )
        numbers: list[int] = []
        best: list[float] = []
        for row in complete:
            if row.feasible:
                score = row.scores[metric.name]
                numbers.append(row.number + 1)
                best.append(better(score, best[-1]) if best else score)
        if complete and best:
            numbers.append(complete[-1].number + 1)
            best.append(best[-1])
        axes.step(numbers, best, where="post", color=_BEST, lw=2, label="best feasible so far")
        if (metric.low, metric.high) == (0.0, 1.0):
            axes.set(ylim=(-0.02, 1.02))
        axes.set_title(report.title, parse_math=False, fontsize=10)
        axes.set_xlabel("trial")
        axes.set_ylabel(score_label(metric.name))
        axes.locator_params(axis="x", integer=True)
        axes.legend(loc="upper right", fontsize=8, frameon=False)


def _mark(axes: Axes, report: Report) -> None:
    """Mark the unmodified model and the confirmed best."""
    axes.scatter(
        [report.vanilla["forget_rouge1"]],
        [report.vanilla["retain_rouge1"]],
        s=70,
        marker="s",
        facecolors="none",
        edgecolors="black",
        label="unmodified model",
        clip_on=False,
    )
    if report.best is not None and report.confirmed is not None:
        axes.scatter(
            [report.confirmed["forget_rouge1"]],
            [report.confirmed["retain_rouge1"]],
            s=160,
            marker="*",
            c=_BEST,
            edgecolors="black",
            label=f"best, in full: {report.best.label}",
            clip_on=False,
            zorder=3,
        )


class _picture:
    """A figure with one set of axes, written to a file at the end of the block."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Axes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        FigureCanvasAgg(self._figure)
        axes: Axes = self._figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    def __exit__(self, kind: type[BaseException] | None, *_rest: Any) -> None:
        if kind is None:
            buffer = io.BytesIO()
            self._figure.savefig(buffer, dpi=_DPI, format="png")
            write_atomically(self._path, buffer.getvalue())
