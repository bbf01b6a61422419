"""A search's folder with one confirmed trial, run by a worker in this process without Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution

from lunar_tune.config.fields import shared_options
from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.metrics.goal import goal_of
from lunar_tune.models.loading import load_config
from lunar_tune.search.loop import Confirmation
from lunar_tune.search.outputs import write_best
from lunar_tune.search.samplers import open_study
from lunar_tune.search.space import SearchSpace
from lunar_tune.study.answers import write_answers
from lunar_tune.study.folder import Folder
from lunar_tune.study.stored_search import configuration_document
from lunar_tune.study.study import Study
from lunar_tune.trial.assemble import assemble, materialise
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

NOWHERE = "http://127.0.0.1:9"
"""A store that cannot be reached: the discard port."""


def made_search(
    runs: Path,
    name: str,
    options: RunOptions,
    parameters: Mapping[str, Any],
    *,
    floor: float = 0.0,
    confirmed: bool = True,
) -> Path:
    """Run one trial, keep it as a search keeps it, and return the search's folder.

    Args:
        runs: Folder of all searches.
        name: Of this one.
        options: Of its run.
        parameters: Of the trial.
        floor: Least retain ROUGE-1.
        confirmed: Whether the trial is evaluated in full and is the best.
    """
    shared = shared_options(dataclasses.replace(options, cache_limit=0), SearchConfig)
    bounds = (f"retain_rouge1>={floor}",)
    config = dataclasses.replace(shared, output=runs, name=name, constrain=bounds)
    spec = assemble(config)
    engine = dataclasses.replace(spec.engine, early_exit=True, retain_floor=floor)
    spec = dataclasses.replace(materialise(spec), engine=engine)
    worker, folder = Worker(spec), Folder(runs / name)
    folder.path.mkdir(parents=True)
    baseline = worker.baseline()
    write_answers(folder.answers(None), baseline.evaluation.rows, (), text=spec.text)
    study = open_study(folder.journal, name=name, space=_space(spec, parameters), config=config)
    study.note("goal", goal_of(config).text)
    study.note("baseline", dict(baseline.evaluation.scores))
    study.note("tags", spec.tags)
    study.note("mlflow", {"id": name, "uri": NOWHERE, "experiment": "x"})
    number, asked = study.ask()
    assert asked == dict(parameters)
    result = worker.run(parameters)
    digest = write_answers(folder.answers(number), result.evaluation.rows, (), text=spec.text)
    study.complete(number, result, answers_digest=digest, n_retain=spec.data.n_retain)
    if confirmed:
        _confirm(worker, study, folder, config, baseline.evaluation.scores)
    resolved = {
        "working_folder": str(Path.cwd()),
        "weights": None,
        "digests": spec.data.digests(),
        "n_layers": depth_of(spec),
    }
    text = configuration_document(config, given={}, derived={}, resolved=resolved)
    folder.config.write_text(text, encoding="utf-8")
    return folder.path


def depth_of(spec: TrialSpec) -> int:
    """Return the number of the model's decoder blocks."""
    return int(load_config(spec.model).num_hidden_layers)


def _space(spec: TrialSpec, parameters: Mapping[str, Any]) -> SearchSpace:
    """Return a space of one setting."""
    return SearchSpace(
        method=spec.method.name,
        variant=spec.method.variant,
        parameters={key: CategoricalDistribution([value]) for key, value in parameters.items()},
        starting_points=(),
        origin="a test",
    )


def _confirm(
    worker: Worker,
    study: Study,
    folder: Folder,
    config: SearchConfig,
    baseline: Mapping[str, float],
) -> None:
    row = study.row(0)
    full = worker.run(row.parameters, full=True)
    write_answers(folder.answers(0, full=True), full.evaluation.rows, (), text=worker.spec.text)
    held = None
    if worker.spec.data.held_out is not None:
        held = worker.baseline(full=True).evaluation
        write_answers(folder.answers(None, full=True), held.rows, (), text=worker.spec.text)
    confirmation = Confirmation(
        number=0,
        scores=dict(full.evaluation.scores),
        max_new_tokens=full.max_new_tokens,
        baseline=dict(held.scores) if held is not None else None,
    )
    study.note("confirmed", dataclasses.asdict(confirmation))
    write_best(
        folder,
        row,
        confirmation,
        spec=worker.spec,
        n_layers=depth_of(worker.spec),
        baseline=baseline,
        goal=goal_of(config),
    )
