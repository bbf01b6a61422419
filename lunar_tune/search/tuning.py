"""The trials of a study under Ray Tune.

Covers: one Tuner with reused actors whose searcher is the study.
Does not cover: what Tune would keep or print: that is switched off or thrown away (`cluster`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ray import tune

from lunar_tune.reporting.rows import TrialRow
from lunar_tune.search.cluster import Resources
from lunar_tune.search.config import SearchConfig
from lunar_tune.search.searcher import Conductor, NewsCallback, StudySearcher
from lunar_tune.search.study import Study
from lunar_tune.search.trainable import UnlearningTrainable
from lunar_tune.trial.spec import TrialSpec

__all__ = ["tune_trials"]


def tune_trials(
    study: Study,
    spec: TrialSpec,
    folder: Path,
    *,
    config: SearchConfig,
    resources: Resources,
    on_start: Callable[[TrialRow], None],
    on_end: Callable[[TrialRow], None],
) -> bool:
    """Run trials until their number, the time or the patience is used up.

    Args:
        study: Asked for parameters and told results.
        spec: What the workers load.
        folder: Where workers write answers.
        config: Number of trials, time budget, patience.
        resources: Of a trial.
        on_start: Called with a trial's row when it begins.
        on_end: Called with a trial's row when the study has its result.

    Returns:
        Whether the search gave up because too many trials failed in a row.
    """
    conductor = Conductor(
        study,
        deadline=None if config.time_budget is None else time.monotonic() + config.time_budget,
        max_failures=config.max_failures,
        on_start=on_start,
        on_end=on_end,
    )
    trainable = tune.with_resources(
        tune.with_parameters(UnlearningTrainable, spec=spec, folder=folder),
        {"cpu": resources.cpus, "gpu": resources.gpus},
    )
    with tempfile.TemporaryDirectory(prefix="lunar-tune-ray-") as scratch:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(conductor),
                num_samples=config.num_trials,
                max_concurrent_trials=resources.concurrency,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=folder.name,
                storage_path=scratch,
                callbacks=[NewsCallback(conductor)],
                verbose=0,
                log_to_file=False,
            ),
        ).fit()
    return conductor.gave_up
