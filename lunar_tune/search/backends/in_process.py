"""This process as the one worker of a search: for notebooks, debugging and tests."""

from __future__ import annotations

import itertools
import logging
import os

from lunar_tune.search.backends.interface import Resources
from lunar_tune.search.loop import DONE, SearchLoop, Signal
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import TaskRunner, format_error

__all__ = ["InProcess", "resources_here"]

logger = logging.getLogger(__name__)


class InProcess:
    """Runs one task after another, without Ray."""

    def run(self, loop: SearchLoop, spec: TrialSpec) -> None:
        """Run tasks until the loop is done; see `backends.interface`."""
        runner = TaskRunner(spec)
        try:
            for task_id in map(str, itertools.count()):
                task = loop.next(task_id)
                if isinstance(task, Signal):
                    if task is not DONE:
                        raise AssertionError("nothing runs that could be waited for")
                    return
                try:
                    outcome = runner.run(task)
                except Exception as error:  # what would have ended a worker; the next is a new one
                    logger.debug("a task crashed", exc_info=True)
                    runner.close()
                    runner = TaskRunner(spec)
                    loop.lose(task_id, format_error(error))
                else:
                    loop.take(task_id, outcome)
        finally:
            runner.close()


def resources_here(device: str) -> Resources:
    """Return what trials in this process use: all of its cores, and a GPU where there is one."""
    import torch

    on_gpu = device != "cpu" and torch.cuda.is_available()
    return Resources(cpus=float(os.cpu_count() or 1), gpus=float(on_gpu), concurrency=1)
