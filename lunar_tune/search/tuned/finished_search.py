"""A finished search's folder as a tuned setting with its provenance.

Covers: reading what a search left (`best.yaml`, `config.yaml`, how many trials there are), and
refusing what is no finished search or found nothing feasible.
Does not cover: where it is kept (`tuned_store`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lunar_tune import __version__
from lunar_tune.config.decoding_settings import PUBLISHED_MAX_NEW_TOKENS
from lunar_tune.errors import InputError
from lunar_tune.search.tuned.tuned_settings import TunedSetting
from lunar_tune.search.tuned.tuned_store import keep_setting
from lunar_tune.yaml_files import describe_mistakes

__all__ = ["keep_finished", "read_finished"]

_LINEAGE = ("base", "source", "revision", "fingerprint", "data", "data_digest")


def keep_finished(folder: Path, *, replace: bool = False) -> tuple[TunedSetting, Path]:
    """Keep the best setting of a finished search; return it and the file that has it.

    Args:
        folder: Of the search.
        replace: Whether it takes the place of a better one, too.

    Raises:
        InputError: There is nothing to keep, or what is kept already is as good.
        LunarTuneError: It cannot be written.
    """
    model, setting = read_finished(folder)
    return setting, keep_setting(model, setting, replace=replace)


def read_finished(folder: Path) -> tuple[str, TunedSetting]:
    """Return the model's name and the best setting of a finished search.

    Args:
        folder: Of the search.

    Raises:
        InputError: It is no finished search, or one that found nothing feasible.
    """
    best, config = _documents(folder)
    if best.get("feasible") is not True:
        raise InputError(f"{folder}: its best setting is not feasible, and only feasible are kept.")
    model = best.get("model")
    if not isinstance(model, str) or not model:
        raise _no_search(folder, "best.yaml: model is missing")
    confirmed = _part(best, "confirmed")
    try:
        setting = TunedSetting.model_validate(
            {
                **{name: best.get(name) for name in ("data", "forget_edges", "method")},
                "variant": best.get("solver"),
                "parameters": best.get("parameters"),
                "minimise": best.get("minimise"),
                "constraints": best.get("constraints"),
                "scores": confirmed.get("scores"),
                "provenance": {
                    "search": folder.resolve().name,
                    "date": f"{_ended(folder):%Y-%m-%d}",
                    "trials": _trials(folder),
                    "seed": best.get("seed"),
                    "max_new_tokens": confirmed.get("max_new_tokens"),
                    "confirmed_in_full": _in_full(config, confirmed),
                    **_model(config),
                },
            }
        )
    except ValidationError as error:
        raise _no_search(folder, "; ".join(describe_mistakes(error, ()))) from error
    return model, setting


def _documents(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `best.yaml` and `config.yaml`, or say why there is nothing to keep."""
    if not folder.is_dir():
        raise InputError(f"--keep {folder}: there is no such folder; name one of runs/.")
    documents = []
    for name in ("config.yaml", "best.yaml"):
        path = folder / name
        if path.is_file():
            documents.append(_document(folder, path))
        elif name == "best.yaml" and documents and (folder / "report.md").is_file():
            raise InputError(
                f"{folder}: the search has no confirmed feasible setting, so there is nothing to "
                "keep (report.md says what came out)."
            )
        else:
            raise _no_search(folder, f"there is no {name}")
    config, best = documents
    return best, config


def _document(folder: Path, path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _no_search(folder, f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise _no_search(folder, f"{path.name} says nothing")
    return content


def _no_search(folder: Path, reason: str) -> InputError:
    return InputError(
        f"{folder}: is not the folder of a finished search ({reason}). Name one that "
        "python -m lunar_tune.search has ended in, such as runs/NAME."
    )


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = document.get(name)
    return part if isinstance(part, dict) else {}


def _given(config: Mapping[str, Any], name: str) -> Any:
    """Return the value of one of the run's options."""
    return _part(_part(config, "run"), name).get("value")


def _ended(folder: Path) -> datetime:
    return datetime.fromtimestamp((folder / "best.yaml").stat().st_mtime, UTC)


def _trials(folder: Path) -> int:
    """Return how many trials were run, whatever was asked for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: int = pq.read_metadata(folder / "trials.parquet").num_rows
    except (OSError, pa.ArrowInvalid) as error:
        raise _no_search(folder, "there is no readable trials.parquet") from error
    return rows


def _in_full(config: Mapping[str, Any], confirmed: Mapping[str, Any]) -> bool:
    """Say whether all rows were asked with at least the published token budget."""
    tokens = confirmed.get("max_new_tokens")
    enough = isinstance(tokens, int) and tokens >= PUBLISHED_MAX_NEW_TOKENS
    return enough and _given(config, "evaluation_rows") is None and not _given(config, "holdout")


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return where model and data come from; of folders the name alone, for files are shared."""
    resolved, weights = _part(config, "resolved"), _given(config, "model_path")
    source, lineage = resolved.get("model_source"), resolved.get("lineage")
    if isinstance(source, str) and Path(source).is_absolute():
        source = Path(source).name
    if isinstance(lineage, dict):
        lineage = {name: lineage.get(name) for name in _LINEAGE}
        if Path(str(lineage["source"])).is_absolute():
            lineage["source"] = Path(str(lineage["source"])).name
    return {
        "digests": _of_questions(resolved.get("digests")),
        "source": source,
        "weights": Path(weights).name if isinstance(weights, str) else None,
        "revision": _given(config, "revision"),
        "lineage": lineage,
        "version": resolved.get("version", __version__),
    }


def _of_questions(digests: Any) -> Any:
    """Return the digests of the sets whose questions scores are about."""
    if not isinstance(digests, dict):
        return digests
    return {name: digests[name] for name in ("forget", "retain", "factual") if name in digests}
