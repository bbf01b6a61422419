"""An exported setting of a search as a version of a model in MLflow's registry."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from lunar_tune.errors import InputError, Problems
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.store import open_experiment, opened_store, store_of
from lunar_tune.tracking.sync import completed_runs, shown_scores, sync

__all__ = ["check_registrable", "register_model"]

_REFUSED = "/:'"  # MLflow refuses two, and its filters of names have no escape for the third


def check_registrable(search: StoredSearch, name: str, *, tracking_uri: str | None = None) -> None:
    """Check that a model of a search can be registered by a name, before it is exported.

    Raises:
        InputError: The name will not do, or the store cannot be used.
    """
    problems = Problems()
    with problems.collect():
        _check_name(name)
    with problems.collect(), opened_store(store_of(search, tracking_uri)) as client:
        open_experiment(client, search.study.notes["mlflow"]["experiment"])
    problems.raise_if_any(InputError)


def register_model(
    search: StoredSearch,
    folder: Path,
    name: str,
    *,
    row: TrialRow,
    scores: Mapping[str, float],
    form: str,
    tracking_uri: str | None = None,
) -> int:
    """Register an exported model as a new version and return its number.

    The folder is kept in a place of its own among the artifacts of the search's run, so that no
    version changes with a later one. The alias `best` moves to a version of the confirmed best.

    Args:
        search: Whose setting was exported.
        folder: What was exported.
        name: Of the model in the registry; made if missing.
        row: The trial.
        scores: Of what was exported.
        form: checkpoint or adapter.
        tracking_uri: Of the store, where it was moved or wants a password.

    Raises:
        InputError: There is nothing to register, or the store refuses.
    """
    _check_name(name)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InputError(f"{folder}: there is nothing to register; export the model first.")
    place = f"model/trial-{row.number}-{form}-{uuid.uuid4().hex[:8]}"
    with opened_store(store_of(search, tracking_uri)) as client:
        run = completed_runs(client, search)[0] or sync(search, client)
        client.log_artifacts(run.info.run_id, str(folder), place)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description="Unlearned by lunar-tune.")
        # A server takes no source but a place among the run's own files.
        version = client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/{place}",
            run_id=run.info.run_id,
            tags={**_tags(search, row, scores), "format": form},
            description=f"{search.title}: {row.label}",
        )
        if row == search.best:
            client.set_registered_model_alias(name, "best", version.version)
    return int(version.version)


def _tags(search: StoredSearch, row: TrialRow, scores: Mapping[str, float]) -> dict[str, str]:
    facts: dict[str, object] = {"feasible": row.feasible, "retain_exact": row.retain_exact}
    if row == search.best:
        feasible = search.goal.is_kept(search.confirmed or {})
        facts = {"feasible": feasible, "on_held_out": search.held_out}
    return {
        "search": search.folder.name,
        "trial": str(row.number),
        **{key: str(fact).lower() for key, fact in facts.items() if fact is not None},
        **search.study.notes["tags"],
        **{key: repr(value) for key, value in row.parameters.items()},
        **{key: f"{value:.6g}" for key, value in shown_scores(scores).items()},
    }


def _check_name(name: str) -> None:
    """Refuse a name that MLflow does not take."""
    if not name.strip():
        raise InputError("--register is empty: name a model.")
    refused = [sign for sign in _REFUSED if sign in name]
    if refused or name in {".", ".."}:
        what = " and ".join(refused) or name
        raise InputError(f"--register {name}: the registry takes no name with {what}.")
