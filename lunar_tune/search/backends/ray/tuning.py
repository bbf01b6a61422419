"""The tasks of a search under Ray Tune.

Covers: one Tuner with reused actors whose searcher is the course.
Does not cover: what Tune would keep or print: that is switched off or thrown away (`cluster`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from lunar_tune.search.backends.ray.cluster import Resources
from lunar_tune.search.backends.ray.searcher import CourseSearcher, NewsCallback
from lunar_tune.search.backends.ray.trainable import PENALISED, UnlearningTrainable
from lunar_tune.search.loop import Course
from lunar_tune.trial.spec import TrialSpec

__all__ = ["run_course"]


def run_course(
    course: Course,
    spec: TrialSpec,
    folder: Path,
    resources: Resources,
    *,
    scheduler: str = "none",
    timeout: float | None = None,
) -> None:
    """Run tasks until the course is over.

    Args:
        course: Says what to run and is told what came out.
        spec: What the workers load.
        folder: Where workers write answers.
        resources: Of a task.
        timeout: Seconds that a trial may take.
        scheduler: Who may end a fit early; one of `config.SCHEDULERS`.
    """
    trainable = tune.with_resources(
        tune.with_parameters(UnlearningTrainable, spec=spec, folder=folder, timeout=timeout),
        {"cpu": resources.cpus, "gpu": resources.gpus},
    )
    with tempfile.TemporaryDirectory(prefix="lunar-tune-ray-") as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=CourseSearcher(course),
                scheduler=_scheduler(scheduler),
                num_samples=-1,  # the course says when it is over
                max_concurrent_trials=resources.concurrency,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=scratch,
                callbacks=[NewsCallback(course)],
                verbose=0,
                log_to_file=False,
            ),
        ).fit()


def _scheduler(name: str) -> TrialScheduler | None:
    """Return Tune's scheduler by name; it compares looks at fits by epochs and penalised score."""
    common: dict[str, Any] = {"time_attr": "epochs", "metric": PENALISED, "mode": "min"}
    if name == "asha":
        return AsyncHyperBandScheduler(**common, max_t=10**6, reduction_factor=2)
    return MedianStoppingRule(**common, grace_period=1) if name == "median" else None
