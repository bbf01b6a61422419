"""What a search has left, read without the classes under test."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def rows_of(search: Path) -> list[dict[str, Any]]:
    """Return a search's trials."""
    return pq.read_table(search / "trials.parquet").to_pylist()


def statuses(output: Path) -> tuple[list[str], list[str]]:
    """Return how the parent runs and how the child runs of an output folder's store ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("lunar-tune")
        runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    parents = [run for run in runs if run not in children]
    ended = [sorted(run.info.status for run in group) for group in (parents, children)]
    return ended[0], ended[1]


def fits_a_screen(shown: object) -> bool:
    """Say whether a `repr` has at most 25 lines of 100 columns."""
    lines = repr(shown).splitlines()
    return len(lines) <= 25 and all(len(line) <= 100 for line in lines)
