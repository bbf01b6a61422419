"""A search's pictures and tables from its folder, on journals that no search wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from chart_specs import axis, panels
from made_outcomes import complete, trial_result
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lunar_tune import SearchResults, load_search
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.metrics.goal import Goal
from lunar_tune.report.charts import CHARTS
from lunar_tune.report.page import write_static_page
from lunar_tune.report.results import short_report
from lunar_tune.search.outputs import write_mirrors
from lunar_tune.search.space import SearchSpace, open_study
from lunar_tune.study.answers import write_answers
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import parameter_importance
from lunar_tune.trial.layer_scores import LayerPrior, LayerSimilarities, Similarities

TRIALS = 12
GOAL = Goal.read("forget_rouge1", ["retain_rouge1>=0.8"])
PRIOR = LayerPrior(
    model="tiny",
    n_layers=4,
    best=3,
    recommended=(2, 3),
    data="mini",
    forget_edges=("A_B",),
    rows=12,
    coefficient=0.5,
    max_new_tokens=32,
    seed=0,
    embedding="own states",
    base_model=Similarities(s1=-0.5, s2=1.0, unfinished=0),
    layers=tuple(
        LayerSimilarities(layer=layer, s1=layer / 10, s2=1 - layer / 10, unfinished=0)
        for layer in range(4)
    ),
)


def answer(text: str, rouge1: float) -> AnswerRow:
    return AnswerRow(
        set_name="forget",
        edge="A_B",
        question="Who?",
        truth="Cedar",
        answer=text,
        rouge1=rouge1,
        rouge_l=rouge1,
        row=2,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> SearchResults:
    """A search of random settings in which the learning rate alone decides."""
    folder = tmp_path_factory.mktemp("runs") / "s"
    folder.mkdir()
    space = SearchSpace(
        method="lunar",
        variant="adamw",
        parameters={
            "layer": IntDistribution(0, 3),
            "coefficient": CategoricalDistribution((4.0, 1.0, 2.0)),
            "learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
        },
        starting_points=(),
        origin="a test",
    )
    config = SearchConfig(seed=0, sampler="random")
    study = open_study(folder / "study.journal", name="s", space=space, config=config)
    for key, value in {
        "goal": GOAL.text,
        "baseline": {"forget_rouge1": 1.0, "retain_rouge1": 0.98},
        "tags": {
            "model": "tiny",
            "data": "mini",
            "forget_edge": "A_B",
            "method": "lunar",
            "solver": "adamw",
        },
        "layer_prior": PRIOR.document(),
    }.items():
        study.note(key, value)
    for _ in range(TRIALS):
        number, point = study.ask()
        decade = math.log10(point["learning_rate"])  # -4 to -1
        complete(study, number, trial_result(-(decade + 1) / 3, 0.9))
    write_answers(folder / "trials" / "baseline.parquet", [answer("Cedar", 1.0)], ())
    write_answers(folder / "trials" / "00004.parquet", [answer("I do not know", 0.0)], ())
    return load_search(folder)


def test_a_report_knows_scales_and_lists_from_the_study(results: SearchResults) -> None:
    assert results.study.log_scale == {"learning_rate"}
    assert results.study.listed == {"coefficient": (4.0, 1.0, 2.0)}


def test_a_report_knows_what_decides_and_leaves_out_what_does_not_differ(
    results: SearchResults,
) -> None:
    assert set(results.importance) == {"forget_rouge1"}
    shares = results.importance["forget_rouge1"]
    assert max(shares, key=lambda name: shares[name]) == "learning_rate"


def test_what_decides_is_computed_once_and_only_where_it_is_shown(
    results: SearchResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []

    def noting(rows: Any, distributions: Any, metric: str) -> dict[str, float] | None:
        computed.append(metric)
        return parameter_importance(rows, distributions, metric)

    monkeypatch.setattr("lunar_tune.study.stored_search.parameter_importance", noting)
    again = load_search(results.folder.path)
    assert again.title == "tiny, mini: forget A_B, lunar (adamw)"
    assert short_report(again)
    assert computed == []
    both = ["forget_rouge1", "retain_rouge1"]
    write_mirrors(Folder(tmp_path), again)
    assert computed == both
    write_static_page([load_search(results.folder.path)], tmp_path / "page.html")
    assert computed == both * 2


def test_a_report_has_the_layers_that_the_search_scored(results: SearchResults) -> None:
    assert results.layer_prior == PRIOR.model_dump(mode="json")


@pytest.mark.parametrize("name", list(CHARTS))
def test_a_notebook_has_every_chart(results: SearchResults, name: str) -> None:
    spec = results.chart(name).to_dict()
    assert spec["title"]["text"] == ["tiny, mini: forget A_B, lunar (adamw)"]
    assert spec["concat"]


def test_a_notebook_names_a_chart_and_its_parameter(results: SearchResults) -> None:
    (panel, _) = panels(results.chart("sensitivity", parameter="layer"))
    assert axis(panel, "x")["title"].startswith("layer")
    with pytest.raises(InputError, match=r"unknown chart 'tradeoff'.*trade_off"):
        results.chart("tradeoff")


def test_mirrors_hold_every_picture_and_the_report_links_those(
    results: SearchResults, tmp_path: Path
) -> None:
    folder = type(results.folder)(tmp_path)
    write_mirrors(folder, results)
    files = [*folder.pictures.rglob("*.*"), folder.trials]
    assert all(path.stat().st_size > 0 for path in files)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    links = [line.split("](")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    pictures = [path.relative_to(tmp_path).as_posix() for path in files if path.suffix == ".png"]
    assert sorted(links) == sorted(pictures)
    assert len(links) == 7
    assert "Share of the variance" in text


def test_answers_stand_beside_the_base_model(results: SearchResults) -> None:
    (row,) = results.answers_table(4).to_dict("records")
    assert row == {
        "set": "forget",
        "edge": "A_B",
        "row": 2,
        "question": "Who?",
        "truth": "Cedar",
        "base_model": "Cedar",
        "answer": "I do not know",
        "rouge1_before": 1.0,
        "rouge1": 0.0,
        "rouge_l": 0.0,
        "ended": None,
    }
    with pytest.raises(InputError, match="no confirmed best"):
        results.answers_table()
