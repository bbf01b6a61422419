"""Whether the data are still those of a search: on others its trials cannot be run again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lunar_tune.data.data_catalog import DataKind, resolve_data
from lunar_tune.errors import DataError, InputError, Problems
from lunar_tune.trial.sets import own_data

if TYPE_CHECKING:
    from lunar_tune.report.results import SearchResults
    from lunar_tune.trial.spec import TrialSpec

__all__ = ["check_same_data"]

_PROMPTS = ("reference_prompts", "refusals")


def check_same_data(results: SearchResults, spec: TrialSpec) -> None:
    """Check that the data are what a search read.

    Args:
        results: The search; what an earlier version has kept no digest of is not compared.
        spec: Of its trials, assembled again.

    Raises:
        InputError: A set is another one; the file that it comes from is named.
    """
    options = results.config.trial_options
    pairs = options.data or own_data(spec.model)
    sources = {"factual": options.factual_data, **{n: getattr(options, n) for n in _PROMPTS}}
    then = results.config.resolved.get("digests") or {}
    changed: dict[str, list[str]] = {}
    for name, digest in spec.data.digests().items():
        if then.get(name, digest) != digest:
            changed.setdefault(sources.get(name, pairs), []).append(name)
    problems = Problems()
    for source, names in changed.items():
        kind: DataKind = "prompts" if set(names) <= set(_PROMPTS) else "records"
        sets = " and ".join(names).replace("_", " ")
        problems.add(
            f"{_place(source, kind)}: the data have changed since the search: the {sets} "
            f"{'set is another one' if kind == 'records' else 'are others'}. Its trials cannot be "
            "run again; put the file back, or search again."
        )
    problems.raise_if_any(InputError)


def _place(source: str, kind: DataKind) -> Path | str:
    """Return the file that a name means."""
    try:
        return resolve_data(source, kind=kind)
    except DataError:  # no file: factual data that are switched off now
        return source
