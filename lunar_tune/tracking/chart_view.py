"""A view of MLflow's page of runs that opens with a search's trials on the right axes.

    keep_view(client, mirror, runs)  ->  the experiment's tag mlflow.sharedViewState.<key>

Covers: what MLflow 3.17 keeps when a user shares a view, written beforehand: every trial in
parallel coordinates (parameters, scores, feasible), and what is forgotten against what is kept.
Does not cover: the page's address (`ui`); which runs there are (`mirror`).

The page that compares runs takes no axes from its address and opens with one metric.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from lunar_tune.tracking.mirror import Mirror

__all__ = ["keep_view"]

_TAG = "mlflow.sharedViewState."
_SECTION = "lunar-tune"


def keep_view(client: MlflowClient, mirror: Mirror, runs: Sequence[Run]) -> str | None:
    """Keep a search's view with its experiment; return its key, None where the store refuses it.

    Args:
        client: Of the store.
        mirror: Of the search.
        runs: Those of its trials that have scores; at least one.
    """
    from mlflow.exceptions import MlflowException

    key = f"{_SECTION}-{mirror.run_id}"
    try:
        client.set_experiment_tag(mirror.experiment_id, _TAG + key, json.dumps(_view(mirror, runs)))
    except MlflowException:  # a server may let its users read alone
        return None
    return key


def _view(mirror: Mirror, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the page's state."""
    measured = set.intersection(*(set(run.data.metrics) for run in runs))
    parameters: list[str] = []
    logarithms: list[str] = []
    for name in runs[0].data.params:
        if len({run.data.params.get(name) for run in runs}) > 1 or len(runs) == 1:
            if (logarithm := f"log10_{name}") in measured:
                logarithms.append(logarithm)
            else:
                parameters.append(name)
    scores = [name for name in mirror.metrics if name in measured]
    first, second = scores[:2]
    return {
        # Ordered by start, the page would nest the trials below their search and draw that alone.
        "orderByKey": f"metrics.`{first}`",
        "orderByAsc": mirror.low_is_good,
        "searchFilter": f"tags.`mlflow.parentRunId` = '{mirror.run_id}'",
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [
            _chart(
                "PARALLEL",
                selectedParams=parameters,
                selectedMetrics=[*logarithms, *scores, "feasible"],
                showAllRuns=True,
            ),
            _chart("SCATTER", xaxis=_axis(first), yaxis=_axis(second)),
        ],
        "compareRunSections": [
            {
                "uuid": _SECTION,
                "name": mirror.search,
                "display": True,
                "columns": 1,
                "cardHeight": 480,
                "isReordered": False,
                "deleted": False,
                "isGenerated": False,
            }
        ],
    }


def _chart(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"{_SECTION}-{kind.lower()}",
        "metricSectionId": _SECTION,
        "deleted": False,
        "isGenerated": False,
        **more,
    }


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}
