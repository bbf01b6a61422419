"""An exported setting of a search as a version of a model in MLflow's registry.

Covers: an exported folder kept under the search's run, a version of it with setting and scores,
the alias `best` for the confirmed best, what can be checked before there is anything to register.
Does not cover: exporting; any folder will do.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from lunar_tune.errors import InputError, Problems
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.mirror import find_mirror, opened_store
from lunar_tune.tracking.trial_runs import shown_scores

__all__ = ["ALIAS", "check_registrable", "register_model"]

ALIAS = "best"
_FOLDER = "model"
# MLflow refuses the first two, and its filters of names have no escape for the third.
_REFUSED = "/:'"


def check_registrable(results: StoredSearch, name: str, *, tracking_uri: str | None = None) -> None:
    """Check that a model of a search can be registered, before it is exported.

    Args:
        results: The search.
        name: Of the model in the registry.
        tracking_uri: Of the store, where it was moved or wants a password.

    Raises:
        InputError: The name will not do, the search has no run, or the store cannot be reached.
    """
    problems = Problems()
    with problems.collect():
        _check_name(name)
    with problems.collect():
        mirror = find_mirror(results, tracking_uri)
        with opened_store(mirror.uri) as client:
            client.get_run(mirror.run_id)
    problems.raise_if_any(InputError)


def register_model(
    results: StoredSearch,
    folder: Path,
    name: str,
    *,
    row: TrialRow,
    scores: Mapping[str, float],
    form: str,
    tracking_uri: str | None = None,
) -> int:
    """Register an exported model as a new version and return its number.

    The folder is kept in a place of its own among the files of the search's run, so that no version
    changes with a later one. The alias `best` moves to a version of the confirmed best.

    Args:
        results: The search.
        folder: What was exported.
        name: Of the model in the registry; made if missing.
        row: The trial that was exported.
        scores: Of what was exported.
        form: Of what was exported: checkpoint, adapter or delta.
        tracking_uri: Of the store, where it was moved or wants a password.

    Raises:
        InputError: There is nothing to register, the search has no run, or the store refuses.

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
    mirror = find_mirror(results, tracking_uri)
    tags = {
        "search": results.folder.name,
        "trial": str(row.number),
        "format": form,
        **_facts(results, row),
        **{key: str(value) for key, value in results.study.notes["tags"].items()},
        **{key: repr(value) for key, value in row.parameters.items()},
        **{key: f"{value:.6g}" for key, value in shown_scores(scores).items()},
    }
    place = f"{_FOLDER}/trial-{row.number}-{form}-{uuid.uuid4().hex[:8]}"
    with opened_store(mirror.uri) as client:
        run = client.get_run(mirror.run_id)
        client.log_artifacts(mirror.run_id, str(folder), place)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description="Unlearned by lunar-tune.")
        # A server takes no source but a place among the run's own files.
        version = client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/{place}",
            run_id=mirror.run_id,
            tags=tags,
            description=f"{results.title}: {row.label}",
        )
        if results.best is not None and results.best.number == row.number:
            client.set_registered_model_alias(name, ALIAS, version.version)
    return int(version.version)


def _facts(results: StoredSearch, row: TrialRow) -> dict[str, str]:
    """Return what has to be known of a trial's scores: bounds, estimates, questions held out."""
    confirmed = results.confirmed
    if confirmed is None or results.best != row:
        facts = {"feasible": row.feasible, "retain_exact": row.retain_exact}
    else:
        kept = results.goal.is_kept(confirmed)
        facts = {"feasible": kept, "on_held_out": results.held_out}
    return {name: str(fact).lower() for name, fact in facts.items() if fact is not None}


def _check_name(name: str) -> None:
    """Refuse a name that MLflow does not take."""
    if not name.strip():
        raise InputError("--register is empty: name a model.")
    refused = [sign for sign in _REFUSED if sign in name]
    if refused or name in {".", ".."}:
        what = " and ".join(refused) or name
        raise InputError(f"--register {name}: the registry takes no name with {what}.")
