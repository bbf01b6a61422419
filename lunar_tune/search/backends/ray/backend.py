"""Ray Tune as the backend of a search: one Tuner with reused actors whose searcher is the loop."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass

from ray import tune

from lunar_tune.search.backends.interface import Resources
from lunar_tune.search.backends.ray.cluster import leave_ray
from lunar_tune.search.backends.ray.ray_watch import watched
from lunar_tune.search.backends.ray.searcher import LoopCallback, LoopSearcher
from lunar_tune.search.backends.ray.trainable import UnlearningTrainable
from lunar_tune.search.display.log_file import RECORD
from lunar_tune.search.loop import SearchLoop
from lunar_tune.study.folder import Folder
from lunar_tune.trial.spec import TrialSpec

__all__ = ["OnRay"]


@dataclass(frozen=True, slots=True)
class OnRay:
    """Runs tasks on Ray's workers, inside a session of `cluster.ray_session`."""

    resources: Resources
    """Resources of a task."""
    folder: Folder
    """Folder of the search."""
    timeout: float | None = None
    """Seconds that a trial may take."""

    def run(self, loop: SearchLoop, spec: TrialSpec) -> None:
        """Run tasks until the loop is done; see `backends.interface`.

        Raises:
            BackendLostError: One of Ray's own processes has ended.
        """
        try:
            with watched(self._last_word):
                self._fit(loop, spec)
        except KeyboardInterrupt:
            leave_ray()
            raise

    def _fit(self, loop: SearchLoop, spec: TrialSpec) -> None:
        resources = {"cpu": self.resources.cpus, "gpu": self.resources.gpus}
        trainable = tune.with_resources(
            tune.with_parameters(
                UnlearningTrainable, spec=spec, folder=self.folder, timeout=self.timeout
            ),
            resources,
        )
        with tempfile.TemporaryDirectory(prefix="lunar-tune-ray-") as scratch:
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=LoopSearcher(loop),
                    num_samples=-1,  # the loop says when it is done
                    max_concurrent_trials=self.resources.concurrency,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name=self.folder.name,
                    storage_path=scratch,
                    # Tune would keep one at the end of each task, and lose the worker where its
                    # node does not have the folder.
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    callbacks=[LoopCallback(loop, self.folder)],
                    verbose=0,
                    log_to_file=False,
                ),
            ).fit()

    def _last_word(self, lost: str) -> None:
        """Say how to go on, where the main thread hangs inside of Ray."""
        text = (
            f"{lost}. What was computed is kept: go on with lunar-tune search --resume "
            f"{self.folder.path}"
        )
        RECORD.error(text)
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()
