"""What ends a gradient method's fit early."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from command_lines import small_run

from lunar_tune.methods.contract import Fit
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.evaluator import Check, drive
from lunar_tune.trial.tasks import TRIAL, Task, TaskRunner
from lunar_tune.trial.worker import TrialResult, Worker


class MadeFit(Fit):
    """A fit that trains nothing, and counts its epochs."""

    def __init__(self, n_epochs: int) -> None:
        self.n_epochs, self.done = n_epochs, 0

    def __iter__(self) -> Iterator[int]:
        for epoch in range(1, self.n_epochs + 1):
            self.done = epoch
            yield epoch


def seen_of(fit: MadeFit, *retain: float, floor: float | None = 0.8) -> list[int]:
    """Return after which epochs a fit is looked at that keeps so much, look by look."""
    kept = iter(retain)

    def look(epochs: int) -> Check:
        return Check(epochs=epochs, forget_rouge1=0.0, retain_rouge1=next(kept, 1.0))

    return [check.epochs for check in drive(fit, floor, look)]


def test_a_fit_is_looked_at_at_even_distances_and_not_after_its_last_epoch() -> None:
    looks = {20: [4, 8, 12, 16], 12: [3, 6, 9], 3: [1, 2], 1: []}
    assert {epochs: seen_of(MadeFit(epochs)) for epochs in looks} == looks
    assert seen_of(MadeFit(20), floor=None) == []


def test_a_fit_that_is_below_half_of_the_floor_twice_in_a_row_ends() -> None:
    ends = {(0.39,): 20, (0.39, 0.39): 8, (0.39, 0.41): 20, (0.9, 0.4): 20, (0.2, 0.9, 0.39, 0): 16}
    for retain, done in ends.items():
        seen_of(fit := MadeFit(20), *retain)
        assert fit.done == done, retain


def test_a_task_tells_the_looks_and_looking_changes_no_score(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A random model keeps nothing: below every floor but that of zero."""
    run = small_run(checkpoint("qwen2"), tmp_path, method="ga", fix=("epochs=12",))
    worker = Worker(assemble(run))

    def result(floor: float, **options: Any) -> TrialResult:
        worker.spec = dataclasses.replace(worker.spec, early_exit=True, retain_floor=floor)
        runner = TaskRunner(worker.spec)
        runner._worker = worker
        task = Task(kind=TRIAL, number=1, parameters={"learning_rate": 1e-3}, **options)
        outcome = runner.run(task)
        assert outcome.result is not None
        return outcome.result

    lost, kept = result(0.8), result(0.0)
    assert ([check.epochs for check in lost.checks], len(lost.losses)) == ([3, 6], 6)
    assert ([check.epochs for check in kept.checks], len(kept.losses)) == ([3, 6, 9], 12)
    whole = worker.run({"learning_rate": 1e-3}, bounded=False)
    assert whole.checks == ()
    assert whole.losses == kept.losses
    assert whole.evaluation.scores == kept.evaluation.scores
