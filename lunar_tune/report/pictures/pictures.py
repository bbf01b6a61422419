"""All pictures of a search, and writing those that apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lunar_tune.registry import Registry
from lunar_tune.report.pictures.figure import PICTURE_SUFFIXES, Canvas, save_figure
from lunar_tune.report.pictures.history_figure import history
from lunar_tune.report.pictures.importance_figure import importance, no_importance
from lunar_tune.report.pictures.layer_coefficient import (
    layer_coefficient,
    no_layer_coefficient,
)
from lunar_tune.report.pictures.layers_figure import layers, no_layers
from lunar_tune.report.pictures.sensitivity import no_sensitivity, sensitivity
from lunar_tune.report.pictures.trade_off_figure import trade_off
from lunar_tune.report.report import Report

__all__ = ["PICTURES", "Picture", "write_pictures"]


def _always(_report: Report) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One kind of picture."""

    caption: str
    """What it shows, in a few words."""
    draw: Callable[[Report], Canvas]
    why_not: Callable[[Report], str | None] = _always
    """Why a search has no such picture; None if it has."""


PICTURES: Registry[Picture] = Registry("picture")
for _name, _picture in {
    "trade_off": Picture(caption="what is forgotten against what is kept", draw=trade_off),
    "history": Picture(caption="best feasible so far, over trials and time", draw=history),
    "layer_coefficient": Picture(
        caption="layer and coefficient", draw=layer_coefficient, why_not=no_layer_coefficient
    ),
    "sensitivity": Picture(
        caption="sensitivity to the learning rate, or what stands in its place",
        draw=sensitivity,
        why_not=no_sensitivity,
    ),
    "importance": Picture(
        caption="importance of the parameters", draw=importance, why_not=no_importance
    ),
    "layers": Picture(caption="similarities that choose a layer", draw=layers, why_not=no_layers),
}.items():
    PICTURES.register(_name, _picture)


def write_pictures(report: Report, folder: Path) -> dict[str, list[Path]]:
    """Write the pictures that apply, as PNG and SVG; return the files of each by its name."""
    written: dict[str, list[Path]] = {}
    for name, picture in PICTURES.items():
        if picture.why_not(report) is None:
            figure = picture.draw(report)
            written[name] = [folder / f"{name}{suffix}" for suffix in PICTURE_SUFFIXES]
            for path in written[name]:
                save_figure(figure, path)
    return written
