"""The command that shows a data card: names, files and groups, a table and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import refused, small_data, succeeded

from lunar_tune.cli.describe import describe as COMMAND
from lunar_tune.data.data_catalog import BUNDLED
from lunar_tune.data.splits import groups_file
from lunar_tune.models.loading import LoadedModel

GREEK = {"edge": "C_D", "question": "In Greek?", "answer": "αβγ"}


def test_every_shipped_data_set_has_a_card() -> None:
    for name in BUNDLED:
        assert "length" in succeeded(COMMAND, name)


def test_a_file_has_the_numbers_that_its_maker_knows_and_json_has_the_whole_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three edges of three pairs, "What is item n of E?" with six words, all answers different."""
    target = tmp_path / "cards" / "card.json"
    data = small_data(tmp_path)
    shown = succeeded(COMMAND, data)
    assert "9 pairs, 3 edges" in shown
    assert "rows by edge: A_B 3, B_C 3, C_D 3" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["question", "in", "words", "6", "6", "6"] in lines
    assert ["A_B", "3", *("0", "(0", "%)") * 3] in lines
    assert "Nothing that stands in the way was found" in shown
    assert succeeded(COMMAND, data, "--json", target, "--quiet") == ""
    card = json.loads(target.read_text())
    assert (card["path"], card["tokens"]) == (str(tmp_path / "pairs.json"), {})
    assert card["edges"] == {"A_B": 3, "B_C": 3, "C_D": 3}
    assert card["words"]["question"] == {"least": 6, "median": 6, "most": 6}
    assert card["forget"][0]["edge"] == "A_B"
    monkeypatch.setenv("LUNAR_TUNE_DATA", str(tmp_path))
    data.rename(tmp_path / "pistol-2.json")
    assert "9 pairs, 3 edges" in succeeded(COMMAND, "pistol-2"), "of a fetched name as of a file"


def test_groups_are_shown_and_can_be_forgotten_and_edges_are_shown_as_written(
    tmp_path: Path,
) -> None:
    data = small_data(tmp_path)
    groups_file(data).write_text('{"ends": ["A_B", "C_D"]}')
    shown = succeeded(COMMAND, data, "--forget-edge", "ends")
    assert "group ends: 2 edges, A_B, C_D" in shown
    assert [line.split()[0] for line in shown.splitlines() if "(0 %)" in line] == ["A_B", "C_D"]
    groups_file(data).unlink()
    data.write_text(data.read_text().replace("A_B", "[red]A[/red]"))
    shown = succeeded(COMMAND, data, "--forget-edge", "[red]A[/red]")
    assert shown.count("[red]A[/red]") == 2  # among all edges, and among those to forget
    asked = "no edge A_B: name what is to be forgotten with --forget-edge"
    assert asked in succeeded(COMMAND, data)


def test_long_lists_of_edges_are_cut_and_answers_without_a_word_for_rouge_reported(
    tmp_path: Path,
) -> None:
    rows = [{"edge": f"e{n}", "question": f"{n}?", "answer": f"{n}."} for n in range(15)]
    data = tmp_path / "p.json"
    data.write_text(json.dumps([*rows, GREEK]))
    shown = succeeded(COMMAND, data)
    assert "e11 1 and 4 more edges (all of them with --json)" in shown
    assert "no word for ROUGE: C_D: 'In Greek?' -> 'αβγ'" in shown
    assert "no word for ROUGE" not in succeeded(COMMAND, data, "--rouge-tokenizer", "words")


def test_tokens_are_those_of_the_models_own_tokenizer(
    tmp_path: Path, checkpoint: Callable[..., Path], loaded: Callable[..., LoadedModel]
) -> None:
    target = tmp_path / "card.json"
    data = small_data(tmp_path)
    shown = succeeded(COMMAND, data, "--model", checkpoint("qwen2"), "--json", target)
    assert "question in tokens" in shown
    counts = [
        len(loaded("qwen2").tokenizer.encode(row["answer"], add_special_tokens=False))
        for row in json.loads(data.read_text())
    ]
    tokens = json.loads(target.read_text())["tokens"]["answer"]
    assert (tokens["least"], tokens["most"]) == (min(counts), max(counts))


def test_prompts_are_told_from_pairs_by_suffix_and_first_row(tmp_path: Path) -> None:
    for name, content in (
        ("a.json", '[{"instruction": "Say no."}]'),
        ("b.json", '["Say no."]'),
        ("c.txt", "Say no.\n"),
    ):
        (tmp_path / name).write_text(content)
        assert "1 prompts, SHA-256" in succeeded(COMMAND, tmp_path / name)
        message = refused(COMMAND, tmp_path / name, "--forget-edge", "A_B")
        assert "holds prompts, no edges" in message


def test_mistakes_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = small_data(tmp_path)
    for option, value, expected in (
        ("--forget-edge", "Q", "unknown forget edge 'Q'"),
        ("--forget-edge", " ,", "--forget-edge is empty"),
        ("--json", ".", "is a folder, not a file"),
        ("--json", "pairs.json/card.json", "is a file, not a folder"),
        ("--rouge-tokenizer", "none", "there are default, words"),
        ("--model", ".", "is not on this machine"),
        ("--model", "tiny", "it is built on first use"),
        ("--model", "nothing", "unknown model"),
    ):
        assert expected in refused(COMMAND, data, option, value)
