"""What runs on a worker: the Ray Tune trainable.

Covers: a thin actor that loads the model once and is reused from task to task: the unmodified
model, trials, full evaluations; a step for each look at a fit that goes on, so that a scheduler can
end it; answers written before scores are reported.
Does not cover: the trial itself (`trial.worker`), which task comes next (`loop`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ray import tune

from lunar_tune.errors import EditedModelError, InputError, LunarTuneError
from lunar_tune.models.device import limit_threads
from lunar_tune.models.memory import give_back, is_out_of_memory
from lunar_tune.search.backends.ray.cluster import described
from lunar_tune.search.backends.ray.watchdog import Watchdog
from lunar_tune.search.backends.ray.worker_warnings import WarningsHeard
from lunar_tune.search.loop import TRIAL, VANILLA
from lunar_tune.study.folder import Folder
from lunar_tune.study.tables import write_answers
from lunar_tune.trial.checks import Check
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import TrialResult, Worker

__all__ = ["PENALISED", "UnlearningTrainable", "report"]

PENALISED = "penalised_forget_rouge1"
"""What schedulers compare: forget ROUGE-1, and what retain ROUGE-1 lacks of the floor, weighted so
that a fit which loses half of the floor is worse than one that forgets nothing."""
PENALTY = 3.0
IN_FULL = 10
"""How many times as long as a trial the tasks may take that ask every question to its end."""


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
        "checks": [dataclasses.asdict(check) for check in result.checks],
        "answers_digest": digest,
    }
    return json.dumps(kept)


class UnlearningTrainable(tune.Trainable):
    """One task after another on one model; the actor and its model outlive the task."""

    def setup(  # type: ignore[override]  # Ray passes with_parameters' values by keyword
        self, config: dict[str, Any], spec: TrialSpec, folder: Path, timeout: float | None = None
    ) -> None:
        """Note what will be loaded; it is loaded in the first step, where an error can be told."""
        _own_threads()
        self._task = config
        self._spec, self._folder = spec, Folder(folder)
        self._watchdog = Watchdog(self._folder, timeout)
        self._warnings = WarningsHeard()
        self._worker: Worker | None = None
        self._trial: Generator[Check, None, TrialResult] | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next task; nothing else changes."""
        self._end_trial()
        self._task = new_config
        return True

    def cleanup(self) -> None:
        """Put the model back if a trial was ended from outside."""
        self._end_trial()
        self._warnings.close()

    def step(self) -> dict[str, Any]:
        """Run the task, or a trial to its next look; report what it gives, or why nothing."""
        kind, number = self._task["task"], self._task["number"]
        outcome: dict[str, Any]
        try:
            outcome = self._advance() if kind == TRIAL else {"report": self._run(kind)}
        except EditedModelError:
            raise  # Ray replaces the process, and with it the model
        except LunarTuneError as error:
            outcome = {"failure": str(error), "wrong_input": isinstance(error, InputError)}
        except OSError as error:
            # A full disk, a folder that is gone: no setting's fault.
            outcome = {"failure": f"{type(error).__name__}: {error}", "again": True}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            outcome = {"failure": described(error)}
        if "failure" in outcome:
            give_back()  # outside the handlers, where no error holds tensors any more
        if self._trial is None:
            self._watchdog.end()
        return {"number": number, "done": True, **self._warnings.take(), **outcome}

    def _run(self, kind: str) -> str:
        """Evaluate the unmodified model, or a setting in full."""
        worker = self._ready()
        self._watchdog.begin(self._task["number"], times=IN_FULL)
        if kind == VANILLA:
            vanilla = worker.vanilla()
            self._write(self._folder.vanilla_answers, vanilla)
            scores = dict(vanilla.evaluation.scores)
            told = {"scores": scores, "note": worker.plain_decoding}
            if "coefficient" in self._task["parameters"]:
                told["layer_prior"] = self._layer_prior(worker)
            return json.dumps(told)
        if not worker.drafts:
            worker.vanilla()  # a worker that began later: its trials check these answers
        bounded = self._spec.data.held_out is None  # there the answer is reported, not judged
        full = worker.run(self._task["parameters"], full=True, bounded=bounded)
        path = self._folder.full_answers(self._task["number"])
        self._write(path, full)
        scores = dict(full.evaluation.scores)
        confirmed: dict[str, Any] = {"scores": scores, "max_new_tokens": full.max_new_tokens}
        if self._spec.data.held_out is not None:  # on these nothing is known of it yet
            vanilla = worker.vanilla(full=True)
            self._write(self._folder.vanilla_full_answers, vanilla)
            confirmed["vanilla"] = dict(vanilla.evaluation.scores)
        return json.dumps(confirmed)

    def _layer_prior(self, worker: Worker) -> str:
        """Score the layers of the space on the model that is loaded; return the prior's text."""
        from lunar_tune.trial.layer_prior import LayerPrior
        from lunar_tune.trial.layer_scores import layer_scores

        coefficient = self._task["parameters"]["coefficient"]
        scores = layer_scores(worker, coefficient=coefficient, layers=self._spec.layers)
        n_layers = worker.loaded.n_layers
        return LayerPrior.of(scores, self._spec, n_layers=n_layers).document()

    def _advance(self) -> dict[str, Any]:
        """Run a trial to the next look at its fit, or to its end."""
        worker = self._ready()  # a model may take longer to load than a trial may take
        if self._trial is None:
            if not worker.drafts:
                worker.vanilla()
            self._watchdog.begin(self._task["number"])
            self._trial = worker.trial(self._task["parameters"])
        try:
            check = next(self._trial)
        except StopIteration as end:
            self._trial = None
            return {"report": self._kept(end.value)}
        except BaseException:
            self._trial = None
            raise
        missed = max(0.0, (self._spec.engine.retain_floor or 0.0) - check.retain_rouge1)
        penalised = check.forget_rouge1 + PENALTY * missed
        return {"done": False, PENALISED: penalised, **dataclasses.asdict(check)}

    def _ready(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._spec)
        return self._worker

    def _kept(self, result: TrialResult) -> str:
        """Write a trial's answers; return what the study keeps."""
        digest = self._write(self._folder.answers(self._task["number"]), result)
        return report(result, self._ready().spec, digest)

    def _write(self, path: Path, result: TrialResult) -> str:
        """Write answers, with what of them may be written; return the file's digest."""
        losses = result.fit.losses if result.fit is not None else ()
        return write_answers(path, result.evaluation.rows, losses, text=self._spec.text)

    def _end_trial(self) -> None:
        if self._trial is not None:
            self._trial.close()
            self._trial = None
        self._watchdog.end()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep nothing: the study holds the result, and a trial is not continued."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Restore nothing; see `save_checkpoint`."""


def _own_threads() -> None:
    """Use the CPU cores that Ray has given to this process (it sets OMP_NUM_THREADS)."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    limit_threads(int(given) if given.isdigit() else None)
