"""A search's folder with one trial, run in this process, without MLflow and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from lunar_tune.config.fields import shared_options
from lunar_tune.config.options import RunOptions, SearchConfig
from lunar_tune.driver.backends import Backend, Resources, run_in_process
from lunar_tune.driver.plan import SearchPlan, make_folder, plan_search
from lunar_tune.driver.session import SearchSession
from lunar_tune.study.folder import Folder
from lunar_tune.trial.assemble import configured, materialise
from lunar_tune.yaml_files import write_yaml

NOWHERE = "http://127.0.0.1:9"
"""A store that cannot be reached: the discard port."""
ONE_CPU = Resources(cpus=1, gpus=0, concurrency=1)


def session_of(
    plan: SearchPlan, folder: Folder, backend: Backend, *, console: Console | None = None
) -> SearchSession:
    """Return a session that is not tracked."""
    place = {"id": "one", "uri": NOWHERE, "experiment": "lunar-tune"}
    tracker = MagicMock(place=lambda _: place, uri=NOWHERE)
    shown = console or Console(quiet=True)
    facts = {"console": shown, "given": {}, "arguments": None}
    return SearchSession(plan, folder, backend, ONE_CPU, tracker, **facts)


def made_search(
    runs: Path,
    name: str,
    options: RunOptions,
    parameters: Mapping[str, Any],
    *,
    floor: float = 0.0,
    confirmed: bool = True,
) -> Path:
    """Search a space of one setting, with a floor of retain ROUGE-1; return the search's folder.

    Whether the trial is feasible, and thus confirmed, is known to the caller.
    """
    shared = shared_options(dataclasses.replace(options, cache_limit=0), SearchConfig)
    method, _ = configured(shared)
    kinds = {key: {"type": "fixed", "value": value} for key, value in parameters.items()}
    space = runs / f"{name}.yaml"
    section = {method.variant: {"parameters": kinds, "starting_points": []}}
    space.write_text(write_yaml({method.name: section}), encoding="utf-8")
    bounds = (f"retain_rouge1>={floor}",)
    changes = {"output": runs, "name": name, "space": str(space), "constrain": bounds}
    changes |= {"num_trials": 1, "sampler": "random", "force": True}
    plan = plan_search(dataclasses.replace(shared, **changes))
    plan = dataclasses.replace(plan, spec=materialise(plan.spec))
    folder = make_folder(plan.config, plan.spec)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("lunar_tune.driver.session.write_mirrors", lambda *_: None)
        session_of(plan, folder, run_in_process).run()
    assert folder.best.exists() is confirmed
    return folder.path
