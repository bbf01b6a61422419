"""Searches as they lie on disk, with their runs in MLflow, made without running any."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from made_outcomes import complete, trial_result
from optuna.distributions import FloatDistribution, IntDistribution

from lunar_tune.config.options import EXPERIMENT, SearchConfig
from lunar_tune.driver.samplers import open_study
from lunar_tune.driver.space import SearchSpace
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import Folder, write_answers
from lunar_tune.study.stored_search import configuration_document
from lunar_tune.study.study import Study
from lunar_tune.tracking.address import default_tracking_uri
from lunar_tune.tracking.places import FOLDER
from lunar_tune.tracking.store import opened_store
from lunar_tune.tracking.sync import sync

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SPACE = SearchSpace(
    method="lunar",
    variant="adamw",
    parameters={
        "layer": IntDistribution(0, 3),
        "coefficient": FloatDistribution(0.5, 8.0),
        "learning_rate": FloatDistribution(1e-4, 3e-2, log=True),
    },
    starting_points=({"layer": 1, "coefficient": 2.0, "learning_rate": 0.003},),
    origin="a test",
)
TAGS = {"model": "tiny", "data": "mini", "forget_edge": "A_B", "method": "lunar", "solver": "adamw"}
SCORES = ((0.25, 0.9), (0.0, 0.5), (0.125, 0.85))
"""Forget and retain ROUGE-1 of each trial; the last is the best feasible one."""
BEST = 2
CONFIRMED = {"forget_rouge1": 0.125, "retain_rouge1": 0.8125}
BASELINE = {"forget_rouge1": 1.0, "retain_rouge1": 0.875}
CURVES = ("loss", "best_feasible", "stage_forget_rouge1")
ANSWER = AnswerRow(
    set_name="forget", edge="A_B", question="Où?", truth="Là", answer="„x“", rouge1=0.0, rouge_l=0.0
)


def begun_study(folder: Folder, uri: str | None = None) -> Study:
    """Return the study of a search that has judged the base model and asked for no trial.

    Its folder is made; no `uri` is that of the default store beside it.
    """
    folder.path.mkdir(parents=True)
    study = open_study(folder, SPACE, SearchConfig())
    notes = {
        "mlflow": {
            "id": f"id-of-{folder.name}",
            "uri": uri or default_tracking_uri(folder.path.parent),
            "experiment": EXPERIMENT,
            "origin": {"mlflow.source.type": "LOCAL"},
        },
        "description": {
            "parameters": {**TAGS, "seed": 3},
            "num_trials": len(SCORES),
            "data": {"forget": ("f" * 64, 1), "retain": ("e" * 64, 2)},
            "lineage": {},
        },
        "goal": ("forget_rouge1", ("retain_rouge1>=0.8",)),
        "baseline": BASELINE,
        "tags": TAGS,
    }
    for key, value in notes.items():
        study.note(key, value)
    return study


def make_search(
    output: Path, name: str, uri: str | None = None, *, mirrored: bool = True
) -> Folder:
    """Make a finished search of three trials, the first with answers, as `begun_study` begins one.

    Where it is `mirrored` its runs are in the store.
    """
    folder = Folder(output / name)
    study = begun_study(folder, uri)
    (folder.path / "trials").mkdir()
    digest = write_answers(folder.answers(0), [ANSWER], ())
    for forget, retain in SCORES:
        number, _ = study.ask()
        complete(study, number, trial_result(forget, retain, forget_rows=12), digest=digest)
    study.note("confirmed", {"number": BEST, "scores": CONFIRMED, "max_new_tokens": 512})
    study.note("status", "FINISHED")
    config, given = SearchConfig(tracking_uri=uri), {"tracking_uri": "command line"}
    document = configuration_document(config, given=given if uri else {}, derived={}, resolved={})
    folder.config.write_text(document)
    for place in ("report.md", "page.html", "pictures/history.png", "pictures/answers/a.svg"):
        (folder.path / place).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / place).write_text(place)
    if mirrored:
        with opened_store(uri or default_tracking_uri(output)) as client:
            sync(SearchResults.read(folder.path), client, note="A note.")
    return folder


def with_notes(search: SearchResults, **notes: Any) -> SearchResults:
    """Return a search of which a study says something else."""
    study = dataclasses.replace(search.study, notes={**search.study.notes, **notes})
    return dataclasses.replace(search, study=study)


@dataclasses.dataclass(frozen=True)
class Store:
    """A store, and a search with an identity of its own, so that it is not there yet."""

    uri: str
    client: MlflowClient
    search: SearchResults

    def runs(self, experiment: str = EXPERIMENT) -> list[Run]:
        """Return the active runs of the search, read without the code under test."""
        found = self.client.get_experiment_by_name(experiment)
        runs = self.client.search_runs([found.experiment_id]) if found is not None else []
        return [run for run in runs if self.identity in run.data.tags.values()]

    @property
    def identity(self) -> str:
        return str(self.search.study.notes["mlflow"]["id"])

    @property
    def parents(self) -> list[Run]:
        return [run for run in self.runs() if "mlflow.parentRunId" not in run.data.tags]

    @property
    def trials(self) -> list[Run]:
        runs = [run for run in self.runs() if "mlflow.parentRunId" in run.data.tags]
        return sorted(runs, key=lambda run: run.data.tags["trial"])

    def curve(self, run: Run, name: str) -> list[tuple[int, float]]:
        """Return a metric's points."""
        history = self.client.get_metric_history(run.info.run_id, name)
        return sorted((point.step, point.value) for point in history)

    def files(self, run: Run) -> set[str]:
        """Return the places of a run's artifacts, two folders deep."""
        at = self.client.list_artifacts(run.info.run_id)
        below = [self.client.list_artifacts(run.info.run_id, one.path) for one in at if one.is_dir]
        return {one.path for one in [*at, *itertools.chain.from_iterable(below)]}

    def said(self) -> list[dict[str, Any]]:
        """Return all that the runs say, without what differs by nature."""
        (parent,) = self.parents
        found = []
        for run in [parent, *self.trials]:
            tags = dict(run.data.tags)
            assert tags.pop("mlflow.parentRunId", parent.info.run_id) == parent.info.run_id
            tags.pop(FOLDER, None)
            tags = {name: text.replace(self.identity, "id") for name, text in tags.items()}
            found.append(
                {
                    "name": run.info.run_name,
                    "times": (run.info.start_time, run.info.end_time, run.info.status),
                    "parameters": run.data.params,
                    "tags": tags,
                    "metrics": run.data.metrics,
                    "curves": [self.curve(run, name) for name in CURVES],
                    "data": sorted(one.dataset.digest for one in run.inputs.dataset_inputs),
                    "files": self.files(run),
                }
            )
        return found


_NUMBERS = itertools.count()


@contextmanager
def in_store(uri: str, search: SearchResults) -> Iterator[Store]:
    """Give a store with a search that it does not have."""
    place = {**search.study.notes["mlflow"], "uri": uri, "id": f"id-{next(_NUMBERS)}"}
    with opened_store(uri) as client:
        yield Store(uri, client, with_notes(search, mlflow=place))
