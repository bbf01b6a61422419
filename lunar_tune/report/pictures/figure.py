"""What every picture shares: the figure, its title, its legend, its bytes.

IPython shows a plain matplotlib `Figure` as text unless its inline backend is set up, which happens
with pyplot; `Canvas` brings its own PNG. None of pyplot's state is touched: no figure stays open.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from pathlib import Path

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lunar_tune.files import write_atomically

__all__ = [
    "BEST",
    "DPI",
    "FEASIBLE",
    "INFEASIBLE",
    "PICTURE_SUFFIXES",
    "REGION",
    "SMALL",
    "Canvas",
    "make_figure",
    "rendered",
    "save_figure",
    "show_legend",
]

PICTURE_SUFFIXES = (".png", ".svg")

# Okabe and Ito's palette: told apart by the colour-blind; markers and lines tell apart in grey.
FEASIBLE, INFEASIBLE, BEST = "#0072B2", "#D55E00", "#009E73"
REGION = "#E4EEF5"
SMALL, DPI = 8, 120  # points; dots an inch
_TITLE = 10  # points
_TITLE_LINES, _TITLE_SHARE = 3, 0.96  # of the width, where letters are wide
_TITLE_CHARACTERS, _LEGEND_CHARACTERS = 10, 17  # an inch holds as many, of text that runs wide
_LEGEND_KEY = 0.5  # inches beside each entry's text
_MOST_COLUMNS, _LABEL = 3, 42  # characters of a line; two columns fit the narrowest figure


class Canvas(Figure):
    """A figure that shows itself in a notebook."""

    def _repr_png_(self) -> bytes:
        return rendered(self, "png")


def make_figure(
    title: str, *, rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.8
) -> tuple[Canvas, list[Axes]]:
    """Return a figure with a title and its axes, row by row.

    Args:
        title: Taken as it is, dollar signs too; what is too long is broken or left out.
        rows: Of axes; those of one column share the x axis.
        columns: Of axes; those of one row share the y axis.
        width: Inches.
        height: Inches.
    """
    figure = Canvas(figsize=(width, height), layout="constrained")
    lines = textwrap.wrap(
        title, int(width * _TITLE_CHARACTERS), max_lines=_TITLE_LINES, placeholder=" …"
    )
    text = figure.suptitle("\n".join(lines), fontsize=_TITLE, parse_math=False)
    share = text.get_window_extent().width / figure.bbox.width
    text.set_fontsize(_TITLE * min(1.0, _TITLE_SHARE / share) if share else _TITLE)
    grid = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row")
    axes: list[Axes] = list(grid.flat)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=SMALL)
    return figure, axes


def show_legend(figure: Figure) -> None:
    """Put what is labelled on any of the figure's axes into one legend below them."""
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(textwrap.fill(str(label), _LABEL), handle)
    if not found:
        return
    longest = max(len(line) for label in found for line in label.splitlines())
    column = longest / _LEGEND_CHARACTERS + _LEGEND_KEY
    columns = int(figure.get_figwidth() / column)
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=min(_MOST_COLUMNS, max(1, columns)),
        fontsize=SMALL,
        frameon=False,
    )


def rendered(figure: Figure, form: str) -> bytes:
    """Return a figure as `png` or `svg`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": "lunar-tune"}):
        # A name in a script that the font lacks shows boxes and is no reason for a warning.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(buffer, dpi=DPI, format=form, metadata=metadata)
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, or as SVG where the file's name says so."""
    form = "svg" if path.suffix.lower() == ".svg" else "png"
    write_atomically(path, rendered(figure, form))
