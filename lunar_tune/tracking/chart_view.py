"""A view of MLflow's page of runs that opens with a search's trials on the right axes.

What MLflow 3.17 keeps with an experiment when a user shares a view, written beforehand: the page
takes no axes from its address and would open with one metric.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.sync import completed_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["Compared", "compared"]

_TAG = "mlflow.sharedViewState."
_SECTION = "lunar-tune"


class Compared(NamedTuple):
    """A search as MLflow shows it."""

    name: str
    experiment: str
    trials: list[str]
    """Ids of its completed trials' runs."""
    view: str | None
    """Key of the view of them that is kept with the experiment; None where the store refuses it."""


def compared(client: MlflowClient, search: StoredSearch) -> Compared | None:
    """Keep a search's view in a store; None where that has no run of a completed trial.

    Args:
        client: Of the store.
        search: The search.
    """
    from mlflow.exceptions import MlflowException

    parent, runs = completed_runs(client, search)
    if parent is None or not runs:
        return None
    experiment, key = parent.info.experiment_id, f"{_SECTION}-{parent.info.run_id}"
    view = json.dumps(_view(search, parent.info.run_id, runs))
    shown: str | None = key
    try:
        client.set_experiment_tag(experiment, _TAG + key, view)
    except MlflowException:  # a server may let its users read alone
        shown = None
    return Compared(search.folder.name, experiment, [run.info.run_id for run in runs], shown)


def _view(search: StoredSearch, parent: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the page's state: all trials in parallel coordinates, and two scores as a scatter."""
    goal, measured = search.goal, set.intersection(*(set(run.data.metrics) for run in runs))
    varied = [
        name
        for name in runs[0].data.params
        if len({run.data.params.get(name) for run in runs}) > 1 or len(runs) == 1
    ]
    logarithms = [f"log10_{name}" for name in varied if f"log10_{name}" in measured]
    names = dict.fromkeys((*goal.metrics, "forget_rouge1", "retain_rouge1"))
    scores = [name for name in names if name in measured]
    parallel = {
        "selectedParams": [name for name in varied if f"log10_{name}" not in measured],
        "selectedMetrics": [*logarithms, *scores, "feasible"],
        "showAllRuns": True,
    }
    axes = [{"key": key, "type": "METRIC"} for key in scores[:2]]
    scatter = dict(zip(("xaxis", "yaxis"), axes, strict=True))
    own = {"deleted": False, "isGenerated": False}
    section = {"display": True, "columns": 1, "cardHeight": 480, "isReordered": False, **own}
    return {
        # Ordered by start, the page would nest the trials below their search and draw that alone.
        "orderByKey": f"metrics.`{scores[0]}`",
        "orderByAsc": goal.objective.direction == "minimize",
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'",
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [
            {"type": kind, "uuid": f"{_SECTION}-{kind}", "metricSectionId": _SECTION, **own, **more}
            for kind, more in (
                ("PARALLEL", parallel),
                ("SCATTER", scatter),
            )
        ],
        "compareRunSections": [{"uuid": _SECTION, "name": search.folder.name, **section}],
    }
