"""Searches as they lie on disk, with their runs in MLflow, made without running any."""

from __future__ import annotations

from pathlib import Path

from made_outcomes import complete, trial_result
from optuna.distributions import FloatDistribution, IntDistribution

from lunar_tune.config.search_config import EXPERIMENT, SearchConfig
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.report.results import SearchResults
from lunar_tune.search.samplers import open_study
from lunar_tune.search.space import SearchSpace
from lunar_tune.study.answers import write_answers
from lunar_tune.study.folder import Folder
from lunar_tune.study.study import Study
from lunar_tune.tracking.store import default_tracking_uri, opened_store
from lunar_tune.tracking.sync import sync

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
VANILLA = {"forget_rouge1": 1.0, "retain_rouge1": 0.875}
ANSWER = AnswerRow(
    set_name="forget", edge="A_B", question="Où?", truth="Là", answer="„x“", rouge1=0.0, rouge_l=0.0
)


def begun_study(folder: Folder, uri: str | None = None) -> Study:
    """Return the study of a search that has judged the base model and asked for no trial.

    Args:
        folder: Of the search; made.
        uri: Of the store; None is the default store beside it.
    """
    folder.path.mkdir(parents=True)
    study = open_study(folder.journal, name=folder.name, space=SPACE, config=SearchConfig())
    notes = {
        "mlflow": {
            "id": f"id-of-{folder.name}",
            "uri": uri or default_tracking_uri(folder.path.parent),
            "experiment": EXPERIMENT,
        },
        "description": {
            "parameters": {**TAGS, "seed": 3},
            "num_trials": len(SCORES),
            "data": {"forget": ("f" * 64, 1), "retain": ("e" * 64, 2)},
            "origin": {"mlflow.source.type": "LOCAL"},
            "lineage": {},
        },
        "goal": ("forget_rouge1", ("retain_rouge1>=0.8",)),
        "baseline": VANILLA,
        "tags": TAGS,
    }
    for key, value in notes.items():
        study.note(key, value)
    return study


def make_search(
    output: Path, name: str, uri: str | None = None, *, mirrored: bool = True
) -> Folder:
    """Make a finished search of three trials, the first with answers.

    Args:
        output: Folder of all searches.
        name: Of the search.
        uri: Of its store; None is the default store.
        mirrored: Whether its runs are in the store.
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
    folder.config.write_text("a: 1\n")
    if mirrored:
        with opened_store(uri or default_tracking_uri(output)) as client:
            sync(SearchResults.read(folder.path), client, note="A note.")
    return folder
