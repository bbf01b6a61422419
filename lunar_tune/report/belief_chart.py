"""The chart of what a search's trials say of settings that were not tried."""

from __future__ import annotations

from itertools import pairwise, product

import altair as alt
import numpy as np

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import score_label
from lunar_tune.report import marks
from lunar_tune.report.parameter_charts import mapped_rows
from lunar_tune.study.rows import LAYER, LEAST_BELIEVED, alike
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import Told

_CELLS = 24  # of the coefficient's range


def beliefs(search: StoredSearch) -> alt.ConcatChart:
    """Draw, over layer and coefficient, what objective is believed and how likely all is kept.

    By Gaussian processes as those of the default sampler, whatever sampler proposed.
    What else is searched has the best trial's value. The trials that lie there stand on it, by the
    score that they had, and by whether they are feasible.
    """
    from threadpoolctl import threadpool_limits

    from lunar_tune.study.belief import Belief, Lattice, values_of  # loads scikit-learn

    distributions = search.study.distributions
    rows = [row for row in mapped_rows(search) if distributions.keys() <= row.parameters.keys()]
    if len(rows) < LEAST_BELIEVED or not {LAYER, "coefficient"} <= search.study.ranges.keys():
        raise InputError(
            f"no picture of what is believed: it takes {LEAST_BELIEVED} completed trials of a "
            "search of layer and coefficient."
        )
    goal, lattice = search.goal, Lattice.of(distributions)
    told = [Told(row.parameters, row.reached, goal.violations(row.scores)) for row in rows]
    first = next(iter(alike(rows)), rows[0])
    layers = lattice.axes[lattice.names.index(LAYER)]
    kind = search.study.ranges["coefficient"]
    edges = values_of(kind, _CELLS + 1)
    cells = [*product(layers, pairwise(edges))]
    settings = [
        {**first.parameters, LAYER: layer, "coefficient": sum(ends) / 2} for layer, ends in cells
    ]
    with threadpool_limits(1):
        objective, kept = Belief(lattice, told, np.random.default_rng(0)).at(settings)
    sign = 1 if goal.objective.lower_is_better else -1
    objective = np.clip(sign * objective, goal.objective.low, goal.objective.high)

    x = alt.X(
        "x:O",
        title="layer (decoder block, from 0)",
        scale=alt.Scale(domain=[int(one) for one in layers]),
        axis=alt.Axis(labelAngle=0, labelOverlap=True),
    )
    y = marks.parameter_axis(alt.Y, search, "coefficient", [kind.low, kind.high])
    name = goal.objective.name
    scores = marks.scale(marks.scale_of(name), scheme="cividis")
    panels = []
    for title, values, scale, seen in (
        (f"{score_label(name)}, believed", objective, scores, [row.scores[name] for row in rows]),
        (
            "probability that all is kept",
            kept,
            marks.scale("linear", scheme="cividis", domain=[0, 1]),
            [float(bool(row.feasible)) for row in rows],
        ),
    ):
        legend = alt.Legend(title=title, orient="top", gradientLength=200)
        colour = alt.Color("score:Q", scale=scale, legend=legend)
        field = [
            {"x": int(layer), "y": ends[0], "y2": ends[1], "score": round(float(value), 3)}
            for (layer, ends), value in zip(cells, values, strict=True)
        ]
        places = {
            row.number: {
                "x": row.parameters[LAYER],
                "y": row.parameters["coefficient"],
                "score": score,
            }
            for row, score in zip(rows, seen, strict=True)
        }
        trials = marks.trial_points(
            search,
            rows,
            lambda row, places=places: places[row.number],  # type: ignore[misc]
            x=x,
            y=y,
            color=colour,
            keys=["shape"],
            **marks.ON_DARK,
        )
        panels.append([marks.cells(field, x=x, y=y, y2="y2", color=colour), trials])
    chart = marks.frame(search.title, panels, width=300, height=270, columns=2)
    resolved: alt.ConcatChart = chart.resolve_scale(color="independent")
    return resolved
