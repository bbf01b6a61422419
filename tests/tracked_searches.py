"""Searches as they lie on disk, with their runs in MLflow, made without running any.

Covers: a study of a few trials with a confirmed best, mirrored as a search mirrors it.
Does not cover: models, answers, the tables of a search.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lunar_tune.config.search_config import SearchConfig
from lunar_tune.search.samplers import open_study
from lunar_tune.search.space.space import FloatRange, IntRange, SearchSpace
from lunar_tune.study.folder import Folder
from lunar_tune.tracking.store import default_tracking_uri
from lunar_tune.tracking.trial_runs import SearchTracker

SPACE = SearchSpace(
    method="lunar",
    variant="adamw",
    parameters={
        "layer": IntRange(type="int", low=0, high=3),
        "coefficient": FloatRange(type="float", low=0.5, high=8.0),
        "learning_rate": FloatRange(type="float", low=1e-4, high=3e-2, log=True),
    },
    starting_points=({"layer": 1, "coefficient": 2.0, "learning_rate": 0.003},),
    origin="a test",
)
TAGS = {"model": "tiny", "data": "mini", "forget_edge": "A_B", "method": "lunar", "solver": "adamw"}
SCORES = ((0.25, 0.9), (0.0, 0.5), (0.125, 0.85))
"""Forget and retain ROUGE-1 of each trial; the last is the best feasible one."""
BEST = 2


def result(forget: float, retain: float) -> dict[str, Any]:
    """Return what a worker reports."""
    return {
        "scores": {"forget_rouge1": forget, "retain_rouge1": retain, "forget_rows": 12.0},
        "seconds": {"fit": 0.5, "evaluate": 0.25, "trial": 0.75},
        "retain_rows": 84,
        "retain_exact": True,
        "max_new_tokens": 32,
        "losses": [2.0, 1.0],
        "checks": [{"epochs": 1, "forget_rouge1": 0.9, "retain_rouge1": 0.8}],
        "answers_digest": "ab",
    }


def make_search(output: Path, name: str, uri: str | None = None) -> Folder:
    """Make a search of three trials whose runs are in a store; None is the default store."""
    folder = Folder(output / name)
    folder.path.mkdir(parents=True)
    study = open_study(folder.journal, name=name, space=SPACE, config=SearchConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracker = SearchTracker(uri or default_tracking_uri(output), output=output, name=name)
    notes = {
        "goal": ("forget_rouge1", ("retain_rouge1>=0.8",)),
        "vanilla": {"forget_rouge1": 1.0, "retain_rouge1": 1.0},
        "tags": TAGS,
        "mlflow": tracker.address,
    }
    for key, value in notes.items():
        study.note(key, value)
    for forget, retain in SCORES:
        number, _ = study.ask()
        tracker.start(study.row(number), name=f"lunar {study.row(number).label}", tags=TAGS)
        study.complete(number, result(forget, retain))
        tracker.end(study.row(number), None)
        tracker.progress(study.rows(), "forget_rouge1")
    scores = {"forget_rouge1": 0.125, "retain_rouge1": 0.85}
    study.note("confirmed", {"number": BEST, "scores": scores, "max_new_tokens": 512})
    tracker.conclude(study.row(BEST), scores, feasible=True)
    tracker.close(status="FINISHED")
    return folder
