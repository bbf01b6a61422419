"""What runs on a worker: the Ray Tune trainable, and the two tasks around the trials.

Covers: a thin actor that loads the model once and is reused from trial to trial, answers written
before scores are reported; preflight (the unmodified model) and confirmation (full evaluation).
Does not cover: the trial itself (`trial.worker`), scheduling (`run`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from lunar_tune.errors import LunarTuneError, TrialError
from lunar_tune.reporting.tables import write_answers
from lunar_tune.runtime import limit_threads
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import TrialResult, Worker

__all__ = ["Confirmation", "UnlearningTrainable", "answers_path", "confirm", "preflight", "report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """A full evaluation of one setting."""

    number: int
    result: TrialResult


def answers_path(folder: Path, number: int) -> Path:
    """Return the file of a trial's answers."""
    return folder / "trials" / f"{number:05d}.parquet"


def report(result: TrialResult, spec: TrialSpec, digest: str) -> str:
    """Return what the study keeps of a trial, as JSON: Ray would flatten a mapping."""
    retain_rows = int(result.evaluation.scores["retain_rows"])
    kept = {
        "scores": dict(result.evaluation.scores),
        "seconds": dict(result.seconds),
        "retain_rows": retain_rows,
        "retain_exact": retain_rows == spec.data.n_retain,
        "max_new_tokens": result.max_new_tokens,
        "losses": list(result.fit.losses) if result.fit is not None else [],
        "answers_digest": digest,
    }
    return json.dumps(kept)


class UnlearningTrainable(tune.Trainable):
    """One complete unlearning run for each trial; the actor and its model outlive the trial."""

    def setup(  # type: ignore[override]  # Ray passes with_parameters' values by keyword
        self, config: dict[str, Any], spec: TrialSpec, folder: Path
    ) -> None:
        """Load the model, once per actor."""
        _own_threads()
        self._parameters = config
        self._folder = folder
        self._worker = Worker(spec)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial's parameters; nothing else changes."""
        self._parameters = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Run the trial, write its answers, report its scores or why there are none."""
        number, parameters = self._parameters["number"], self._parameters["parameters"]
        try:
            result = self._worker.run(parameters)
        except TrialError as error:
            return {"number": number, "failure": str(error), "done": True}
        digest = write_answers(
            answers_path(self._folder, number),
            result.evaluation.rows,
            result.fit.losses if result.fit is not None else (),
        )
        return {"number": number, "report": report(result, self._worker.spec, digest), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep nothing: the study holds the result, and a trial is not continued."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Restore nothing; see `save_checkpoint`."""


def preflight(spec: TrialSpec) -> TrialResult:
    """Load the model and evaluate it unmodified, as a trial would be."""
    _own_threads()
    return Worker(spec).vanilla()


def confirm(
    spec: TrialSpec, candidates: Sequence[tuple[int, Mapping[str, Any]]], floor: float
) -> list[Confirmation]:
    """Evaluate candidates in full, best first, until one keeps the retain floor.

    Args:
        spec: The study's spec.
        candidates: Trial numbers and parameters, best first.
        floor: Least retain ROUGE-1.

    Returns:
        What was evaluated; only the last one may keep the floor.
    """
    _own_threads()
    worker = Worker(spec)
    confirmed: list[Confirmation] = []
    for number, parameters in candidates:
        try:
            result = worker.run(parameters, full=True)
        except LunarTuneError:
            continue
        confirmed.append(Confirmation(number=number, result=result))
        if result.evaluation.scores["retain_rouge1"] >= floor:
            break
    return confirmed


def _own_threads() -> None:
    """Use the CPU cores that Ray has given to this process (it sets OMP_NUM_THREADS)."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    limit_threads(int(given) if given.isdigit() else None)
