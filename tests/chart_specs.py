"""Charts as tests read them: panels of layers with their data."""

from __future__ import annotations

from typing import Any

import altair as alt


def panels(chart: alt.ConcatChart) -> list[list[dict[str, Any]]]:
    """Return the layers of each panel, with `values`."""
    spec = chart.to_dict()
    found = []
    for panel in spec["concat"]:
        for layer in panel["layer"]:
            # What all layers share stands with the panel or the chart.
            data = next(one["data"] for one in (layer, panel, spec) if "data" in one)
            layer["values"] = spec["datasets"][data["name"]]
        found.append(panel["layer"])
    return found


def drawn(panel: list[dict[str, Any]], beginning: str) -> list[dict[str, Any]]:
    """Return the points of the entry of the legend that begins so."""
    return [
        one
        for layer in panel
        for one in layer["values"]
        if one.get("kind", "").startswith(beginning)
    ]


def places(panel: list[dict[str, Any]], beginning: str) -> list[tuple[Any, Any]]:
    return [(one["x"], one["y"]) for one in drawn(panel, beginning)]


def steps(panel: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Return the points of the only line."""
    (line,) = forms(panel, "line")
    assert line["mark"]["interpolate"] == "step-after"
    return [(one["x"], one["y"]) for one in line["values"]]


def forms(panel: list[dict[str, Any]], mark: str) -> list[dict[str, Any]]:
    """Return the layers of one kind of mark, for example `rect`."""
    return [layer for layer in panel if layer["mark"]["type"] == mark]


def axis(panel: list[dict[str, Any]], channel: str) -> dict[str, Any]:
    """Return the one axis that all layers share."""
    found = [
        layer["encoding"][channel]
        for layer in panel
        if "title" in layer["encoding"].get(channel, {})
    ]
    assert all(one == found[0] for one in found)
    return found[0]


def legend(chart: alt.ConcatChart) -> list[str]:
    """Return the entries of the legend, each in one line."""
    for panel in panels(chart):
        for layer in panel:
            for channel in ("shape", "color"):
                key = layer["encoding"].get(channel, {})
                if key.get("field") == "kind":
                    return [" ".join(kind.split()) for kind in key["scale"]["domain"]]
    return []
