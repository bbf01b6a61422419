"""The command that asks both models: answers, prompt, standard input, JSON, mistakes."""

from __future__ import annotations

import json
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import command_lines
import pytest
from command_lines import without_ray
from shared_searches import SharedSearch

import lunar_tune as lt
from lunar_tune.cli.ask import ask as COMMAND
from lunar_tune.cli.export import export as EXPORT
from lunar_tune.errors import InputError
from lunar_tune.yaml_files import read_yaml, write_yaml

refused = partial(command_lines.refused, COMMAND)

KNOWN = "What is item 1 of A_B?"


@pytest.fixture
def search(held_out: SharedSearch, tmp_path: Path) -> Path:
    """Return a search on a random model that a test may change: trial 0 is confirmed, 1 failed."""
    return held_out.copied(tmp_path)


def changed(search: Path, part: str, name: str, value: Any) -> None:
    """Change a stored search's configuration."""
    document = read_yaml(search / "config.yaml")
    document[part][name] = value
    (search / "config.yaml").write_text(write_yaml(document))


def test_questions_typed_or_piped_are_answered_and_written_as_json(search: Path) -> None:
    """The sentence model of a search, which may be gone, is not needed."""
    changed(search, "options", "embedding_model", {"value": "./nowhere", "origin": "command line"})
    file = search.parent / "answers.json"
    markup = "Is [bold]this[/bold] :smile: text?"
    named = (search.name, "--output", str(search.parent), "--max-new-tokens", "6")
    result = without_ray(COMMAND, *named, KNOWN, markup, "--json", str(file))
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text(encoding="utf-8"))
    assert (document["search"], document["trial"]) == (search.name, 0)
    assert document["parameters"] == {"learning_rate": 1e-3}
    told = {one["question"]: one["truth"] for one in document["answers"]}
    assert told == {KNOWN: "Kettle 1 of A_B", markup: None}
    for word in ("base model", "unlearned", "true answer", "forget", "Kettle 1 of A_B", markup):
        assert word in result.output
    written = f"answers written to {file}"
    assert written in " ".join(result.output.split("\n"))
    piped = (str(search), "--max-new-tokens", "6", "--quiet", "--json", str(file))
    quiet = without_ray(COMMAND, *piped, stdin=f"{KNOWN}\r\n\n  {markup}  \n".encode("utf-16"))
    assert quiet.exit_code == 0, quiet.output
    answers = result.output[result.output.index("question  ") :].partition("answers written")[0]
    assert quiet.output.strip() == answers.strip(), "answers alone are shown when quiet"


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), (EOFError(), 0), (KeyboardInterrupt(), 130)],
    ids=["an empty line", "the end of input", "an interruption"],
)
def test_a_terminal_is_asked_until_there_is_nothing_more(
    search: Path, monkeypatch: pytest.MonkeyPatch, end: str | BaseException, code: int
) -> None:
    typed = Mock(side_effect=[KNOWN, end])
    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True), stdout=StringIO())
    monkeypatch.setattr("lunar_tune.cli.ask.sys", terminal)
    monkeypatch.setattr("builtins.input", typed)
    file = search.parent / "answers.json"
    result = without_ray(COMMAND, str(search), "--max-new-tokens", "6", "--json", str(file))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert typed.call_args_list == [call("question: ")] * 2
    assert result.output.count("true answer      Kettle 1 of A_B (forget)") == 1
    assert [one["question"] for one in json.loads(file.read_text())["answers"]] == [KNOWN]


def test_all_mistakes_are_said_at_once_before_a_model_is_loaded(
    search: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunar_tune.trial.worker.Worker", None)
    missing = ("another", "Who?", "--output", str(search.parent), "--max-new-tokens", "0")
    message = refused(*missing)
    parts = ("2 things are wrong", "another: there is no such search", "has held-out")
    for part in (*parts, "at least 1"):
        assert part in message
    for arguments, said in (
        (("Who?", "--trial", "1"), "trial 1: the trial is failed; completed are 0"),
        (("Who?", "--trial", "7"), "no such trial"),
        ((), "no question"),
        ((KNOWN, " "), "a question is empty"),
    ):
        assert said in refused(str(search), *arguments)
    said = "standard input: is not UTF-8: byte 0xe9 at offset 3; if é is meant, iconv -f"
    assert said in refused(str(search), stdin=b"Caf\xe9?\n")


def test_a_folder_does_not_decide_that_code_of_its_model_runs(
    search: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for the command nor for Python; `--register` tells no password to its address."""
    asking = Mock(side_effect=InputError("would load"))
    monkeypatch.setattr("lunar_tune.trial.single.asking", asking)
    for name, value in (("trust_remote_code", True), ("tracking_uri", "http://evil.example")):
        changed(search, "options", name, {"value": value, "origin": "command line"})
    needed = "was searched with --trust-remote-code. "
    assert needed in refused(str(search), KNOWN)
    with pytest.raises(InputError, match=needed):
        lt.load(search).ask(KNOWN)
    asking.assert_not_called()
    for flag, runs in (("--trust-remote-code", True), ("--no-trust-remote-code", False)):
        assert "would load" in refused(str(search), KNOWN, flag)
        assert asking.call_args.args[0].model.trust_remote_code == runs
    save = ("--save", str(search.parent / "saved"), "--register", "x")
    message = command_lines.refused(EXPORT, str(search), *save)
    for part in ("2 things are wrong", needed, "with --tracking-uri http://evil.example. "):
        assert part in message


def test_data_or_weights_that_are_gone_or_changed_are_said(
    search: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunar_tune.trial.worker.Worker", None)
    kept = Path(read_yaml(search / "config.yaml")["options"]["data"]["value"])
    pairs = search.parent / "pairs.json"
    pairs.write_text(kept.read_text().replace("Kettle 1 of A_B", "An anchor"))
    changed(search, "options", "data", {"value": str(pairs), "origin": "command line"})
    message = refused(str(search), "Who?")
    assert "the data have changed since the search: the forget set is another one" in message
    assert str(pairs) in message
    pairs.unlink()
    assert "pairs.json" in refused(str(search), "Who?")
    changed(search, "options", "data", {"value": str(kept), "origin": "command line"})
    changed(search, "resolved", "weights", str(search / "nowhere"))
    assert "nowhere" in refused(str(search), "Who?")
