"""Who runs a search's tasks, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lunar_tune.search.loop import SearchLoop
from lunar_tune.trial.spec import TrialSpec

__all__ = ["Backend", "BackendLostError", "Resources"]


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

        Args:
            loop: Says what to run and is told what came out; it keeps errors of its own.
            spec: What workers load.

        Raises:
            KeyboardInterrupt: The user, or a scheduler of jobs, ends the search.
            BackendLostError: Nothing can be run any more.
        """
