"""The tasks of a search under Ray Tune.

Covers: one Tuner with reused actors whose searcher is the course.
Does not cover: what Tune would keep or print: that is switched off or thrown away (`cluster`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from ray import tune

from lunar_tune.search.cluster import Resources
from lunar_tune.search.course import Course
from lunar_tune.search.searcher import CourseSearcher, NewsCallback
from lunar_tune.search.trainable import UnlearningTrainable
from lunar_tune.trial.spec import TrialSpec

__all__ = ["run_course"]


def run_course(course: Course, spec: TrialSpec, folder: Path, resources: Resources) -> None:
    """Run tasks until the course is over.

    Args:
        course: Says what to run and is told what came out.
        spec: What the workers load.
        folder: Where workers write answers.
        resources: Of a task.
    """
    trainable = tune.with_resources(
        tune.with_parameters(UnlearningTrainable, spec=spec, folder=folder),
        {"cpu": resources.cpus, "gpu": resources.gpus},
    )
    with tempfile.TemporaryDirectory(prefix="lunar-tune-ray-") as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=CourseSearcher(course),
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
