"""Searching and unlearning from Python: `import lunar_tune as lt`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jedi
import numpy as np
import pytest
from command_lines import SMALL_SPACE, small_values
from search_results import fits_a_screen

import lunar_tune as lt
import lunar_tune.driver.plan  # whose package has the name of a function
from lunar_tune.cli.search import search as COMMAND
from lunar_tune.config.fields import options_of
from lunar_tune.methods.contract import METHODS
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.metrics.goal import METRICS
from lunar_tune.study.rows import COMPLETE
from lunar_tune.study.study import INTERRUPTED


@pytest.fixture(scope="module")
def options(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Callable[..., Path],
    empty_store: Callable[[Path], Path],
) -> dict[str, Any]:
    """Return options of a search of a random model, each as somebody might write it in Python."""
    folder = tmp_path_factory.mktemp("python")
    empty_store(folder / "runs" / "mlflow.db")
    (folder / "space.yaml").write_text(SMALL_SPACE, encoding="utf-8")
    return {
        **small_values(checkpoint("qwen2"), folder),
        "model": checkpoint("qwen2"),
        "data": folder / "pairs.json",
        "space": folder / "space.yaml",
        "output": str(folder / "runs"),
        "fix": {"epochs": 2},
        "range": {"coefficient": (1, 2)},
        "metrics": "forget_mrr, retain_mrr",
        "constrain": ["retain_rouge1>=0"],
        "max_new_tokens": np.int64(4),
        "seed": 3,
        "force": True,
    }


@pytest.fixture(autouse=True)
def _registered_for_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (METRICS, METHODS):
        monkeypatch.setattr(registry, "_own", dict(registry))
        monkeypatch.setattr(registry, "added", {})


@pytest.fixture(scope="module")
def found(options: dict[str, Any]) -> lt.Search:
    return lt.search(**options, name="first", num_trials=2, quiet=True)


def test_values_are_read_as_the_command_does(found: lt.Search, options: dict[str, Any]) -> None:
    told = found.config.search
    assert told.in_process
    assert (told.fix, told.range) == (("epochs=2",), ("coefficient=1:2",))
    assert told.metrics == ("forget_mrr", "retain_mrr")
    assert (told.model, told.max_new_tokens) == (str(options["model"]), 4)
    assert found.config.origins["seed"] == "Python"
    assert "seed=3" in repr(told)
    assert "holdout" not in repr(told)


def test_a_search_gives_its_trials_answers_and_what_it_was_told(found: lt.Search) -> None:
    assert list(found.trials["state"]) == [COMPLETE] * 2
    assert found.trials["params.coefficient"].between(1, 2).all()
    kept = lt.load("first", output=found.folder.path.parent)
    assert kept.answers().equals(found.answers(found.best.number))
    assert set(found.answers()["set"]) == {"forget", "retain"}
    for shown in (found, found.best, found.config, found.study, found.config.search):
        assert fits_a_screen(shown), shown


def test_a_resumed_search_says_so(found: lt.Search, capsys: pytest.CaptureFixture[str]) -> None:
    more = lt.search(resume="first", output=found.folder.path.parent, num_trials=3)
    assert [row.number for row in more.rows] == [0, 1, 2]
    assert more.config.search.in_process, "what it ran on"
    said = capsys.readouterr().out
    assert "resuming after 2 trials" in said
    assert "-m lunar_tune" not in said, "a notebook has no use for commands"


def test_an_interruption_ends_a_search_and_gives_what_there_is(options: dict[str, Any]) -> None:
    asked: list[Sequence[AnswerRow]] = []

    @lt.metric(lower_is_better=False)
    def retain_patience(rows: Sequence[AnswerRow]) -> float:
        asked.append(rows)
        if len(asked) == 3:  # the base model, one trial, and in the second
            raise KeyboardInterrupt
        return 1.0

    told = {**options, "metrics": ["retain_patience"], "name": "ended", "quiet": True}
    ended = lt.search(**told)
    assert [row.failure for row in ended.rows[:2]] == [None, INTERRUPTED]
    assert {row.set_name for row in asked[0]} == {"retain"}
    assert (ended.ending, ended.best) == ("Interrupted.", None)
    assert ended.rows[0].scores["retain_patience"] == 1.0


def test_all_mistakes_are_said_at_once_and_as_the_command_says_them(tmp_path: Path) -> None:
    with pytest.raises(lt.InputError) as caught:
        lt.search(num_trials=0, minimise="forget_nothing", backend="ray", output=tmp_path)
    assert caught.value.messages[0] == "--num-trials 0: must be at least 1."
    assert "unknown metric 'forget_nothing'" in caught.value.messages[1]
    wrong: dict[str, Any] = {"num_trial": 3, "backend": "mpi", "holdout": "perhaps"}
    with pytest.raises(lt.InputError) as caught:
        lt.search(**wrong)
    assert caught.value.messages == (
        "num_trial is not an option. Did you mean 'num_trials'?",
        "--backend is 'mpi'; in-process or ray is needed.",
        "--holdout is 'perhaps'; true or false is needed.",
    )
    with pytest.raises(lt.InputError, match=r"--concurrency needs Ray"):
        lt.search(concurrency=2, output=tmp_path)


def test_one_setting_answers_beside_the_base_model(options: dict[str, Any], tmp_path: Path) -> None:
    searched = {"space", "output", "range", "constrain", "seed", "force"}
    told = {name: value for name, value in options.items() if name not in searched}
    setting = {"layer": [0, 1], "coefficient": 2, "learning_rate": 0.01}
    run = lt.unlearn(**setting, save=tmp_path / "model", **told)
    assert run.result.parameters["layer"] == [0, 1]
    assert list(run.answers["base_model"]) == [r.answer for r in run.baseline.evaluation.rows]
    assert (tmp_path / "model" / "model.safetensors").is_file()
    for shown in (run, run.spec, run.result, run.spec.data, run.result.evaluation):
        assert fits_a_screen(shown), shown
    assert "forget MRR" in run._repr_html_()
    with pytest.raises(lt.InputError, match="takes coefficient, layer, learning_rate"):
        lt.unlearn(layer=0, ridge=0.1, **told)


def test_a_search_asks_and_exports(found: lt.Search, tmp_path: Path) -> None:
    question = found.answers()["question"][0]
    asked = found.ask(question, "Why?", max_new_tokens=4)
    assert list(asked["question"]) == [question, "Why?"]
    assert list(asked["true_answer"].isna()) == [False, True]
    written = found.export(tmp_path / "model", quiet=True)
    assert repr(written).startswith("checkpoint, proven: ")
    assert fits_a_screen(written)
    with pytest.raises(lt.InputError) as caught:
        found.export(tmp_path, format="gguf", trial=99)
    assert len(caught.value.messages) == 3, "folder, format and trial"


def test_names_of_ones_own_are_registered_again_but_never_in_place_of_others() -> None:
    def registered(name: str) -> None:
        lt.metric(lower_is_better=False, name=name)(lambda _: 0.0)

    registered("forget_mood")
    registered("forget_mood")
    with pytest.raises(lt.InputError, match=r"metric 'forget_mrr' exists"):
        registered("forget_mrr")
    with pytest.raises(lt.InputError, match=r"name some of forget, retain, factual"):
        registered("mood")

    class Own(lt.Method):
        name = "lunar"

    with pytest.raises(lt.InputError, match="method 'lunar' exists"):
        lt.method(Own)


def test_editors_complete_names_and_options() -> None:
    def completed(code: str) -> set[str]:
        return {one.name for one in jedi.Interpreter(code, [{"lt": lt}]).complete()}

    offered = options_of(COMMAND.options).keys() - {"in_process", "dry_run", "config", "debug"}
    assert {f"{name}=" for name in offered | {"backend"}} <= completed("lt.search(")
    assert {"layer=", "fix="} <= completed("lt.unlearn(")
    assert {"plot_trade_off", "plot_layers"} <= completed("lt.search().plot_")
    static = jedi.Script("import lunar_tune as lt\nlt.load('a').plot_").complete(2, 18)
    assert {"plot_history", "plot_importance"} <= {one.name for one in static}
    parameters = inspect.signature(lt.search).parameters
    assert (parameters["num_trials"].default, parameters["model"].default) == (20, "tiny")
    assert "num_trials: Trials to run, at most." in (lt.search.__doc__ or "")
