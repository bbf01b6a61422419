"""The best setting of a search as a version of a model in MLflow's registry.

Covers: an exported folder kept under the search's run, a version of it with setting and scores,
the alias `best`.
Does not cover: exporting; any folder will do.
"""

from __future__ import annotations

from pathlib import Path

from lunar_tune.errors import InputError
from lunar_tune.search.mirror import find_mirror, opened_store
from lunar_tune.search.results import SearchResults
from lunar_tune.search.tracking import shown_scores

__all__ = ["ALIAS", "register_model"]

ALIAS = "best"
_FOLDER = "model"


def register_model(
    results: SearchResults, folder: Path, name: str, *, tracking_uri: str | None = None
) -> int:
    """Register an exported model as a new version and return its number.

    The folder is kept as `model/` among the files of the search's run. The alias `best` moves to
    the new version.

    Args:
        results: The search whose best setting was exported.
        folder: What was exported.
        name: Of the model in the registry; made if missing.
        tracking_uri: Of the store, where it was moved or wants a password.

    Raises:
        InputError: The search has no best setting or no run, or the store refuses.

    Example:
        >>> results = load_search("runs/NAME")  # doctest: +SKIP
        >>> register_model(results, Path("adapter"), "qwen-forgets")  # doctest: +SKIP
    """
    best, confirmed = results.trial(), results.confirmed or {}
    if not name.strip():
        raise InputError("--register is empty: name a model.")
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InputError(f"{folder}: there is nothing to register; export the model first.")
    mirror = find_mirror(results, tracking_uri)
    tags = {
        "search": results.folder.name,
        "trial": str(best.number),
        **{key: str(value) for key, value in results.study.notes["tags"].items()},
        **{key: repr(value) for key, value in best.parameters.items()},
        **{key: f"{value:.6g}" for key, value in shown_scores(confirmed).items()},
    }
    with opened_store(mirror.uri) as client:
        run = client.get_run(mirror.run_id)
        client.log_artifacts(mirror.run_id, str(folder), _FOLDER)
        if not client.search_registered_models(f"name = '{_quoted(name)}'"):
            client.create_registered_model(name, description="Unlearned by lunar-tune.")
        # A server takes no source but a place among the run's own files.
        version = client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/{_FOLDER}",
            run_id=mirror.run_id,
            tags=tags,
            description=f"{results.report.title}: {best.label}",
        )
        client.set_registered_model_alias(name, ALIAS, version.version)
    return int(version.version)


def _quoted(name: str) -> str:
    if "'" in name:
        raise InputError(f"--register {name}: without quotes.")
    return name
