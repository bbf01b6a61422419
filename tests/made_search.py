"""A search's folder with one trial, run in this process, without MLflow and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from made_outcomes import no_tracker
from rich.console import Console

from lunar_tune.config.fields import shared_options
from lunar_tune.config.options import RunOptions, SearchConfig
from lunar_tune.driver.backends import InProcess, Resources
from lunar_tune.driver.plan import make_folder, plan_search
from lunar_tune.driver.session import SearchSession
from lunar_tune.trial.assemble import configured, materialise
from lunar_tune.yaml_files import write_yaml

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
    """Search a space of one setting and return the search's folder.

    Args:
        runs: Folder of all searches.
        name: Of this one.
        options: Of its run.
        parameters: Of the trial.
        floor: Least retain ROUGE-1.
        confirmed: Whether the trial is feasible, which the caller knows, and thus confirmed.
    """
    shared = shared_options(dataclasses.replace(options, cache_limit=0), SearchConfig)
    method, _ = configured(shared)
    kinds = {key: {"type": "fixed", "value": value} for key, value in parameters.items()}
    space = runs / f"{name}.yaml"
    section = {method.variant: {"parameters": kinds, "starting_points": []}}
    space.write_text(write_yaml({method.name: section}), encoding="utf-8")
    bounds = (f"retain_rouge1>={floor}",)
    changes: dict[str, Any] = {"output": runs, "name": name, "space": str(space)}
    changes |= {"constrain": bounds, "num_trials": 1, "sampler": "random", "force": True}
    plan = plan_search(dataclasses.replace(shared, **changes))
    plan = dataclasses.replace(plan, spec=materialise(plan.spec))
    folder = make_folder(plan.config, plan.spec)
    resources = Resources(cpus=1, gpus=0, concurrency=1)
    places = (plan, folder, InProcess(), resources, no_tracker(NOWHERE))
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("lunar_tune.driver.session.write_mirrors", lambda *_: None)
        SearchSession(*places, console=Console(quiet=True), given={}, arguments=None).run()
    assert folder.best.exists() is confirmed
    return folder.path
