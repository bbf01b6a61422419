"""An exported setting of a search as a version of a model in MLflow's registry."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from lunar_tune.errors import InputError, Problems
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.store import open_experiment, opened_store, place_of, store_of
from lunar_tune.tracking.sync import shown_scores, sync

__all__ = ["ALIAS", "check_registrable", "register_model"]

ALIAS = "best"
_REFUSED = "/:'"  # MLflow refuses two, and its filters of names have no escape for the third


def check_registrable(search: StoredSearch, name: str, *, tracking_uri: str | None = None) -> None:
    """Check that a model of a search can be registered, before it is exported.

    Args:
        search: The search.
        name: Of the model in the registry.
        tracking_uri: Of the store, where it was moved or wants a password.

    Raises:
        InputError: The name will not do, or the store cannot be used.
    """
    problems = Problems()
    with problems.collect():
        _check_name(name)
    with problems.collect(), opened_store(store_of(search, tracking_uri)) as client:
        open_experiment(client, place_of(search)["experiment"])
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
        search: The search.
        folder: What was exported.
        name: Of the model in the registry; made if missing.
        row: The trial that was exported.
        scores: Of what was exported.
        form: Of what was exported: checkpoint or adapter.
        tracking_uri: Of the store, where it was moved or wants a password.

    Raises:
        InputError: There is nothing to register, or the store refuses.

    Example:
        >>> results = load_search("runs/NAME")  # doctest: +SKIP
        >>> best, scores = results.trial(), results.confirmed  # doctest: +SKIP
        >>> register_model(  # doctest: +SKIP
        ...     results, Path("adapter"), "forgets", row=best, scores=scores, form="adapter"
        ... )
    """
    _check_name(name)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InputError(f"{folder}: there is nothing to register; export the model first.")
    is_best = search.best is not None and search.best.number == row.number
    facts: dict[str, object] = {"feasible": row.feasible, "retain_exact": row.retain_exact}
    if is_best and search.confirmed is not None:
        kept = search.goal.is_kept(search.confirmed)
        facts = {"feasible": kept, "on_held_out": search.held_out}
    tags = {
        "search": search.folder.name,
        "trial": str(row.number),
        "format": form,
        **{key: str(fact).lower() for key, fact in facts.items() if fact is not None},
        **{key: str(value) for key, value in search.study.notes["tags"].items()},
        **{key: repr(value) for key, value in row.parameters.items()},
        **{key: f"{value:.6g}" for key, value in shown_scores(scores).items()},
    }
    place = f"model/trial-{row.number}-{form}-{uuid.uuid4().hex[:8]}"
    with opened_store(store_of(search, tracking_uri)) as client:
        run = sync(search, client, only=())
        client.log_artifacts(run.info.run_id, str(folder), place)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description="Unlearned by lunar-tune.")
        # A server takes no source but a place among the run's own files.
        version = client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/{place}",
            run_id=run.info.run_id,
            tags=tags,
            description=f"{search.title}: {row.label}",
        )
        if is_best:
            client.set_registered_model_alias(name, ALIAS, version.version)
    return int(version.version)


def _check_name(name: str) -> None:
    """Refuse a name that MLflow does not take."""
    if not name.strip():
        raise InputError("--register is empty: name a model.")
    refused = [sign for sign in _REFUSED if sign in name]
    if refused or name in {".", ".."}:
        what = " and ".join(refused) or name
        raise InputError(f"--register {name}: the registry takes no name with {what}.")
