"""Who runs a search's tasks, behind one interface; this process as its one worker."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from lunar_tune.driver.loop import SearchLoop
from lunar_tune.signals import is_interrupted
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import Task, TaskRunner, format_error

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one trial uses, and how many run at once."""

    cpus: float
    gpus: float
    concurrency: int


class BackendLostError(KeyboardInterrupt):
    """What runs the tasks has ended by itself: Ray Tune takes any other error for a trial's."""


Backend = Callable[[SearchLoop, TrialSpec], None]
"""Asks a loop for tasks, and hands over what they give, until it is done.

A `KeyboardInterrupt` ends it: the user's, of a scheduler of jobs, or a `BackendLostError`.
"""


def run_in_process(loop: SearchLoop, spec: TrialSpec) -> None:
    """Run one task after another, without Ray: for notebooks, debugging and tests."""
    runner = TaskRunner(spec)
    try:
        for task_id in map(str, itertools.count()):
            task = loop.next(task_id)
            if not isinstance(task, Task):
                return
            crash = None
            try:
                outcome = runner.run(task)
            except Exception as error:  # what would have ended a worker; the next is a new one
                logger.debug("a task crashed", exc_info=True)
                crash = format_error(error)
                runner.close()
                runner = TaskRunner(spec)
            if is_interrupted():  # of which a library may have made a failure
                raise KeyboardInterrupt
            if crash is not None:
                loop.lose(task_id, crash)
            else:
                loop.take(task_id, outcome)
    finally:
        runner.close()
