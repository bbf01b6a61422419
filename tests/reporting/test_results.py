"""A search as a user has it in hand: read from its journal, shown on a screen, in a notebook."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import nbformat
import pytest
from chart_specs import axis, panels
from invented_searches import PRIOR, SEARCHES, TAGS, results_of
from made_outcomes import complete, trial_result
from nbclient import NotebookClient
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pages_by_hand import HOSTILE, Parsed, failure, hostile, said, trial
from search_results import fits_a_screen

import lunar_tune as lt
from lunar_tune.config.options import SearchConfig
from lunar_tune.driver.persistence import write_mirrors
from lunar_tune.driver.samplers import open_study
from lunar_tune.driver.space import SearchSpace
from lunar_tune.report.results import short_report, write_static_page
from lunar_tune.study.folder import Folder, write_answers
from lunar_tune.study.rows import parameter_importance

PLOTS = [name for name in vars(lt.Search) if name.startswith("plot_")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> lt.Search:
    """A search of random settings in which the learning rate alone decides."""
    folder = Folder(tmp_path_factory.mktemp("runs") / "s")
    folder.path.mkdir()
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
    study = open_study(folder, space, SearchConfig(sampler="random"))
    study.note("goal", ("forget_rouge1", ("retain_rouge1>=0.8",)))
    study.note("baseline", {"forget_rouge1": 1.0, "retain_rouge1": 0.98})
    study.note("tags", TAGS)
    answers = [said("forget", "Who?", "I do not know", 0.0)]
    digest = write_answers(folder.answers(4), answers, ())
    for _ in range(12):
        number, point = study.ask()
        decade = math.log10(point["learning_rate"])  # -4 to -1
        complete(study, number, trial_result(-(decade + 1) / 3, 0.9), digest=digest)
    write_answers(folder.answers(None), [said("forget", "Who?", "Cedar", 1.0)], ())
    results = lt.load(folder.path)
    vars(results)["layer_prior"] = PRIOR
    return results


def test_a_search_knows_lists_and_what_decides_from_its_journal(
    found: lt.Search,
) -> None:
    assert found.study.listed == {"coefficient": (4.0, 1.0, 2.0)}
    assert set(found.importance) == {"forget_rouge1"}, "the other score does not differ"
    shares = found.importance["forget_rouge1"]
    assert max(shares, key=lambda name: shares[name]) == "learning_rate"


def test_what_decides_is_computed_once_and_only_where_it_is_shown(
    found: lt.Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Mock(wraps=parameter_importance)
    monkeypatch.setattr("lunar_tune.study.stored_search.parameter_importance", counted)
    again = lt.load(found.folder.name, output=found.folder.path.parent)
    assert short_report(again)
    counted.assert_not_called()
    write_static_page([again], tmp_path / "page.html")
    assert again.plot_importance()
    computed = [one.args[2] for one in counted.call_args_list]
    assert computed == ["forget_rouge1", "retain_rouge1"]


def test_a_notebook_has_every_chart(found: lt.Search) -> None:
    assert len(PLOTS) == 7
    for name in PLOTS:
        chart = getattr(found, name)()
        assert chart.to_dict()["title"]["text"] == ["tiny, mini: forget A_B, lunar (adamw)"]
        assert "vegaEmbed" in chart._repr_mimebundle_(None, None)["text/html"]
    (panel, _) = panels(found.plot_sensitivity("layer"))
    assert axis(panel, "x")["title"].startswith("layer")


def test_mirrors_hold_every_picture_and_the_report_links_those(
    found: lt.Search, tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    write_mirrors(folder, found)
    files = [*folder.pictures.rglob("*.*"), folder.trials]
    assert all(path.stat().st_size > 0 for path in files)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    links = [line.split("](")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    pictures = [path.relative_to(tmp_path).as_posix() for path in files if path.suffix == ".png"]
    assert sorted(links) == sorted(pictures)
    assert len(links) == len(PLOTS)
    assert "Share of the variance" in text


def test_answers_stand_beside_the_base_model(found: lt.Search) -> None:
    (row,) = found.answers(4).to_dict("records")
    assert (row["question"], row["true_answer"]) == ("Who?", "the truth")
    assert (row["base_model"], row["unlearned"]) == ("Cedar", "I do not know")
    assert (row["rouge1_before"], row["rouge1"]) == (1.0, 0.0)
    with pytest.raises(lt.InputError, match="no confirmed best"):
        found.answers()


def test_a_trial_that_cannot_be_given_is_named_beside_those_that_can() -> None:
    rows = [trial(0, 0.5, 0.9), trial(1, 0.25, 0.9), failure(2), trial(3, 0.75, 0.9)]
    many = [failure(0), *(trial(n, 0.5, 0.9) for n in range(1, 100))]
    best = "one: has no confirmed best setting, the best as searched is trial 1; name a trial by"
    nth = "one, trial 200: there is no such trial; completed are 1, 2, 3, 4, 5 … 99, 99 in all."
    for among, number, told in (
        (rows, None, f"{best} its number (0, 1, 3)."),
        ([trial(0, 0.1, 0.5)], None, "setting, and no trial is feasible; name"),
        (many, 200, nth),
    ):
        with pytest.raises(lt.InputError) as caught:
            results_of(among, folder=Path("one")).trial(number)
        assert told in str(caught.value)


def test_a_search_its_parts_and_its_options_fit_a_screen() -> None:
    for one in SEARCHES.values():
        parts = [one, one.study, one.goal, *one.rows[:2]]
        assert all(map(fits_a_screen, parts)), parts
        told = one.verdict[:60] if one.best is None else f"(trial {one.best.number})"
        assert told in repr(one)
    assert repr(SearchConfig(num_trials=3, model="x")) == "SearchConfig(model='x', num_trials=3)"


def test_a_notebook_shows_texts_of_others_as_they_are(tmp_path: Path) -> None:
    parsed = Parsed(hostile(tmp_path)._repr_html_())
    seen = {word for tag, attributes in parsed.tags for word in (tag, *attributes)}
    assert seen <= {"div", "br", "table", "thead", "tbody", "tr", "th", "td", "style"}
    assert HOSTILE[2] in parsed.text
    assert HOSTILE[0] in parsed.text


NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "first_search.ipynb"


def test_the_first_search_runs_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Callable[[Path], Path]
) -> None:
    empty_store(tmp_path / "runs" / "mlflow.db")
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "stored without outputs"
    assert "num_trials = 8" in cells[0].source
    cells[0].source = cells[0].source.replace("num_trials = 8", "num_trials = 2")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # tqdm's, where there are no widgets
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    shown = {cell.source: [one for one in cell.outputs if "data" in one] for cell in cells}
    (searched,) = (shown[cell.source] for cell in cells if "lt.search(" in cell.source)
    lines = [one["data"]["text/plain"] for one in searched]
    assert sum("2/2 " in line for line in lines) == 1, "each line is shown once"
    assert "2 trials" in lines[-1]
    html = [one["data"].get("text/html", "") for cell in cells for one in shown[cell.source]]
    assert any("vegaEmbed" in text for text in html)
    assert "unlearned" in shown[cells[-2].source][-1]["data"]["text/plain"]
    assert "checkpoint, proven: " in shown[cells[-1].source][-1]["data"]["text/plain"]
    (model,) = tmp_path.glob("runs/*/model/model.safetensors")
    assert model.stat().st_size > 0
