"""The command that asks both models: answers, prompt, standard input, JSON, mistakes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import command_lines
import pytest
from command_lines import Result, small_data, without_ray
from made_outcomes import complete, trial_result
from optuna.distributions import CategoricalDistribution

from lunar_tune.cli.ask import COMMAND, _shown
from lunar_tune.config.run_options import RunOptions
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.data.records import Record, records_digest
from lunar_tune.metrics.goal import goal_of
from lunar_tune.search.space import SearchSpace, open_study
from lunar_tune.study.stored_search import configuration_document
from lunar_tune.yaml_files import read_yaml, write_yaml

PARAMETERS = {"layer": 1, "coefficient": 20.0, "learning_rate": 0.01}
SCORES = {"forget_rouge1": 0.1, "retain_rouge1": 0.9}
KNOWN = "What is item 1 of A_B?"


@pytest.fixture
def runs(tmp_path: Path, checkpoint: Callable[..., Path]) -> Path:
    """Return a folder with the search `one`: trial 0 is the confirmed best, trial 1 failed."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    config = SearchConfig(
        model=str(checkpoint("qwen2")),
        data=str(small_data(tmp_path)),
        factual_data="none",
        device="cpu",
        fix=("epochs=2",),
        cache_limit=0,
    )
    fixed: Any = {name: CategoricalDistribution([value]) for name, value in PARAMETERS.items()}
    space = SearchSpace(
        method="lunar", variant="adamw", parameters=fixed, starting_points=(), origin="a test"
    )
    study = open_study(folder / "study.journal", name="one", space=space, config=config)
    study.note("goal", goal_of(config).text)
    study.ask()
    complete(study, 0, trial_result(0.1, 0.9, retain_rows=6, budget=4))
    study.ask()
    study.fail(1, "diverged")
    study.note("confirmed", {"number": 0, "scores": SCORES, "max_new_tokens": 512})
    digests = {"forget": records_digest(_forget())}
    document = configuration_document(
        config,
        given=dict.fromkeys((one.name for one in dataclasses.fields(RunOptions)), "command line"),
        derived={},
        resolved={"digests": digests, "working_folder": str(tmp_path)},
    )
    (folder / "config.yaml").write_text(document, encoding="utf-8")
    return folder.parent


def _forget() -> list[Record]:
    return [Record(f"What is item {n} of A_B?", f"Kettle {n} of A_B", "A_B") for n in range(3)]


def invoke(*arguments: str, stdin: str = "") -> Result:
    return without_ray(COMMAND, *arguments, stdin=stdin)


def refused(*arguments: str) -> str:
    return command_lines.refused(COMMAND, *arguments)


def place(runs: Path) -> list[str]:
    return ["--output", str(runs), "--max-new-tokens", "6"]


def test_questions_typed_or_piped_are_answered_and_written_as_json(runs: Path) -> None:
    """The sentence model of a search, which may be gone, is not needed."""
    config = runs / "one" / "config.yaml"
    stored = read_yaml(config)
    stored["options"]["embedding_model"] = {"value": "./nowhere", "origin": "command line"}
    config.write_text(write_yaml(stored))
    file = runs.parent / "answers.json"
    markup = "Is [bold]this[/bold] :smile: text?"
    result = invoke("one", KNOWN, markup, *place(runs), "--json", str(file))
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text(encoding="utf-8"))
    assert (document["search"], document["trial"]) == ("one", 0)
    assert document["parameters"] == PARAMETERS
    assert [one["question"] for one in document["answers"]] == [KNOWN, markup]
    assert [one["truth"] for one in document["answers"]] == ["Kettle 1 of A_B", None]
    for word in ("base model", "unlearned", "true answer", "forget", "Kettle 1 of A_B", markup):
        assert word in result.output
    written = f"answers written to {file}"
    assert written in " ".join(result.output.split("\n"))
    piped = (str(runs / "one"), "--max-new-tokens", "6", "--quiet", "--json", str(file))
    quiet = invoke(*piped, stdin=f"{KNOWN}\n\n  {markup}  \n")
    assert quiet.exit_code == 0, quiet.output
    answers = result.output[result.output.index("question  ") :].partition("answers written")[0]
    assert quiet.output.strip() == answers.strip(), "answers alone are shown when quiet"


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), (EOFError(), 0), (KeyboardInterrupt(), 130)],
    ids=["an empty line", "the end of input", "an interruption"],
)
def test_a_terminal_is_asked_until_there_is_nothing_more(
    runs: Path, monkeypatch: pytest.MonkeyPatch, end: str | BaseException, code: int
) -> None:
    lines = iter([KNOWN, end])
    prompts = []

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True), stdout=StringIO())
    monkeypatch.setattr("lunar_tune.cli.ask.sys", terminal)
    monkeypatch.setattr("builtins.input", typed)
    file = runs.parent / "answers.json"
    result = invoke("one", *place(runs), "--json", str(file))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert prompts == ["question: "] * 2
    assert result.output.count("true answer  Kettle 1 of A_B (forget)") == 1
    assert [one["question"] for one in json.loads(file.read_text())["answers"]] == [KNOWN]


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    assert _shown("a\x1b[2J\tb\nc[red]").plain == "a\\x1b[2J\\tb\nc[red]"


def test_all_mistakes_are_said_at_once_before_a_model_is_loaded(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunar_tune.trial.worker.Worker", None)
    message = refused("another", "Who?", "--output", str(runs), "--max-new-tokens", "0")
    for part in ("2 things are wrong", "another: there is no such search", "has one", "at least 1"):
        assert part in message
    assert "trial 1: the trial is failed; completed are 0" in refused(
        "one", "Who?", "--trial", "1", *place(runs)
    )
    assert "no such trial" in refused("one", "Who?", "--trial", "7", *place(runs))
    assert "no question" in refused("one", *place(runs))
    assert "a question is empty" in refused("one", KNOWN, " ", *place(runs))


def test_data_or_weights_that_are_gone_or_changed_are_said(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunar_tune.trial.worker.Worker", None)
    pairs, config = runs.parent / "pairs.json", runs / "one" / "config.yaml"
    kept = pairs.read_text()
    pairs.write_text(kept.replace("Kettle 1", "Anchor 1"))
    message = refused("one", "Who?", *place(runs))
    assert "the data have changed since the search: the forget set is another one" in message
    assert str(pairs) in message
    pairs.unlink()
    assert "pairs.json" in refused("one", "Who?", *place(runs))
    pairs.write_text(kept)
    document = read_yaml(config)
    document["resolved"]["weights"] = str(runs / "nowhere")
    config.write_text(write_yaml(document))
    assert "nowhere" in refused("one", "Who?", *place(runs))
