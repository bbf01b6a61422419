"""The command that shows a data card: names, files and groups, a table and the same as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import Result, finish, small_data, start, without_ray

from lunar_tune.cli.describe import COMMAND
from lunar_tune.data.data_catalog import BUNDLED
from lunar_tune.data.splits import groups_file
from lunar_tune.models.loading import LoadedModel

ROOT = Path(__file__).resolve().parents[2]


def invoke(*arguments: str | Path) -> Result:
    return without_ray(COMMAND, *arguments)


def succeeded(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refused(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


@pytest.mark.parametrize("name", BUNDLED)
def test_every_shipped_data_set_has_a_card(name: str) -> None:
    assert "length" in succeeded(name)


def test_a_file_has_the_numbers_that_its_maker_knows(tmp_path: Path) -> None:
    """Three edges of three pairs, "What is item n of E?" with six words, all answers different.

    Questions of two edges share 5 of 7 words, below four fifths.
    """
    shown = succeeded(small_data(tmp_path))
    assert "9 pairs, 3 edges" in shown
    assert "rows by edge: A_B 3, B_C 3, C_D 3" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["question", "in", "words", "6", "6", "6"] in lines
    assert ["A_B", "3", *("0", "(0", "%)") * 3] in lines
    assert "Nothing that stands in the way was found" in shown


def test_the_whole_card_is_written_as_json(tmp_path: Path) -> None:
    target = tmp_path / "cards" / "card.json"
    assert succeeded(small_data(tmp_path), "--json", target, "--quiet") == ""
    card = json.loads(target.read_text())
    assert card["path"] == str(tmp_path / "pairs.json")
    assert card["edges"] == {"A_B": 3, "B_C": 3, "C_D": 3}
    assert card["words"]["question"] == {"least": 6, "median": 6, "most": 6}
    assert card["forget"][0]["edge"] == "A_B"
    assert card["tokens"] == {}


def test_groups_are_shown_and_can_be_forgotten(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    groups_file(data).write_text('{"ends": ["A_B", "C_D"]}')
    shown = succeeded(data, "--forget-edge", "ends")
    assert "group ends: 2 edges, A_B, C_D" in shown
    assert [line.split()[0] for line in shown.splitlines() if "(0 %)" in line] == ["A_B", "C_D"]


def test_a_fetched_name_works_as_a_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUNAR_TUNE_DATA", str(tmp_path))
    assert "run scripts/fetch_datasets pistol-2" in refused("pistol-2")
    small_data(tmp_path).rename(tmp_path / "pistol-2.json")
    assert "9 pairs, 3 edges" in succeeded("pistol-2")


def test_an_edge_is_shown_as_it_is_written(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    data.write_text(data.read_text().replace("A_B", "[red]A[/red]"))
    shown = succeeded(data, "--forget-edge", "[red]A[/red]")
    assert shown.count("[red]A[/red]") == 2  # among all edges, and among those to forget


def test_without_the_default_edge_one_is_asked_for(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    data.write_text(data.read_text().replace("A_B", "X_Y"))
    assert "no edge A_B: name what is to be forgotten with --forget-edge" in succeeded(data)


def test_long_lists_of_edges_are_cut_with_a_note(tmp_path: Path) -> None:
    rows = [{"edge": f"e{n}", "question": f"{n}?", "answer": f"{n}."} for n in range(15)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    assert "e11 1 and 3 more edges (all of them with --json)" in succeeded(tmp_path / "p.json")


def test_answers_without_a_word_for_rouge_are_reported(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    data.write_text(json.dumps([*json.loads(data.read_text()), GREEK]))
    shown = succeeded(data)
    assert "no word for ROUGE: C_D: 'In Greek?' -> 'αβγ'" in shown
    assert "1 answers have no word that ROUGE counts" in shown
    assert "no word for ROUGE" not in succeeded(data, "--rouge-tokenizer", "words")


GREEK = {"edge": "C_D", "question": "In Greek?", "answer": "αβγ"}


def test_tokens_are_those_of_the_models_own_tokenizer(
    tmp_path: Path, checkpoint: Callable[..., Path], loaded: Callable[..., LoadedModel]
) -> None:
    target = tmp_path / "card.json"
    data = small_data(tmp_path)
    assert "question in tokens" in succeeded(data, "--model", checkpoint("qwen2"), "--json", target)
    counts = [
        len(loaded("qwen2").tokenizer.encode(row["answer"], add_special_tokens=False))
        for row in json.loads(data.read_text())
    ]
    tokens = json.loads(target.read_text())["tokens"]["answer"]
    assert (tokens["least"], tokens["most"]) == (min(counts), max(counts))


def test_a_tokenizer_that_is_not_here_is_refused(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    assert "is not on this machine" in refused(data, "--model", tmp_path)
    assert "it is built on first use" in refused(data, "--model", "tiny")
    assert "unknown model" in refused(data, "--model", "nothing")


def test_prompts_are_told_from_pairs_by_name_suffix_and_first_row(tmp_path: Path) -> None:
    for name, content in (
        ("a.json", [{"instruction": "Say no."}]),
        ("b.json", ["Say no."]),
        ("c.txt", None),
    ):
        (tmp_path / name).write_text("Say no.\n" if content is None else json.dumps(content))
        assert "1 prompts, SHA-256" in succeeded(tmp_path / name)
    assert "holds prompts, no edges" in refused(tmp_path / "c.txt", "--forget-edge", "A_B")


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    assert "neither a file nor a shipped name" in refused(tmp_path / "none.json")
    assert "unknown forget edge 'Q'" in refused(data, "--forget-edge", "Q")
    assert "--forget-edge is empty" in refused(data, "--forget-edge", " ,")
    assert "is a folder, not a file" in refused(data, "--json", tmp_path)
    assert "there are default, words" in refused(data, "--rouge-tokenizer", "none")
    assert "is a file, not a folder" in refused(data, "--json", data / "card.json")


def test_a_card_without_tokens_loads_no_torch() -> None:
    code = """
import runpy, sys
sys.argv = ["describe", "mini"]
try:
    runpy.run_module("lunar_tune.describe", run_name="__main__")
except SystemExit as end:
    print("ended with", end.code)
print([name for name in ("torch", "transformers", "ray") if name in sys.modules])
"""
    done = finish(start([sys.executable, "-c", code], cwd=ROOT))
    assert done.stdout.splitlines()[-2:] == ["ended with 0", "[]"], done.stderr
