"""Who runs a search's tasks, behind one interface; this process as its one worker."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import Protocol

from lunar_tune.driver.loop import SearchLoop
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
    """What runs the tasks has ended by itself.

    An interruption, since Ray Tune would take any other error for that of a trial.
    """


class Backend(Protocol):
    """Runs tasks until a loop is done."""

    def run(self, loop: SearchLoop, spec: TrialSpec) -> None:
        """Ask the loop for tasks and hand over what they give.

        Raises:
            KeyboardInterrupt: The user, or a scheduler of jobs, ends the search.
            BackendLostError: Nothing can be run any more.
        """


class InProcess:
    """Runs one task after another, without Ray: for notebooks, debugging and tests."""

    def run(self, loop: SearchLoop, spec: TrialSpec) -> None:
        """Run tasks until the loop is done; see `Backend`."""
        runner = TaskRunner(spec)
        try:
            for task_id in map(str, itertools.count()):
                task = loop.next(task_id)
                if not isinstance(task, Task):
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
