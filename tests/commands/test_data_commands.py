"""The commands that show a data card and that fetch data: names, files, tables, one message."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_lines import Result, refused, small_data, succeeded, without_ray
from file_server import HUB, PISTOL_2, FileServer, pistol_rows, serving, tofu_lines

from lunar_tune.cli.describe import describe
from lunar_tune.cli.fetch import fetch
from lunar_tune.cli.models import models
from lunar_tune.cli.search import search
from lunar_tune.data.data_catalog import PUBLISHED
from lunar_tune.data.splits import groups_file
from lunar_tune.models.loading import LoadedModel

GREEK = {"edge": "C_D", "question": "In Greek?", "answer": "αβγ"}


def test_a_file_has_the_numbers_that_its_maker_knows_and_json_has_the_whole_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three edges of three pairs, "What is item n of E?" with six words, all answers different."""
    target = tmp_path / "cards" / "card.json"
    data = small_data(tmp_path)
    shown = succeeded(describe, data)
    assert "9 pairs, 3 edges" in shown
    assert "rows by edge: A_B 3, B_C 3, C_D 3" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["question", "in", "words", "6", "6", "6"] in lines
    assert ["A_B", "3", *("0", "(0", "%)") * 3] in lines
    assert "Nothing that hinders unlearning was found" in shown
    assert succeeded(describe, data, "--json", target, "--quiet") == ""
    card = json.loads(target.read_text())
    assert (card["path"], card["tokens"]) == (str(tmp_path / "pairs.json"), {})
    assert card["words"]["question"] == {"least": 6, "median": 6, "most": 6}
    assert card["forget"][0]["edge"] == "A_B"
    monkeypatch.setenv("LUNAR_TUNE_DATA", str(tmp_path))
    data.rename(tmp_path / "pistol-2.json")
    assert "9 pairs, 3 edges" in succeeded(describe, "pistol-2"), "of a fetched name as of a file"


def test_groups_are_shown_and_can_be_forgotten_and_edges_are_shown_as_written(
    tmp_path: Path,
) -> None:
    data = small_data(tmp_path)
    groups_file(data).write_text('{"ends": ["A_B", "C_D"]}')
    shown = succeeded(describe, data, "--forget-edge", "ends")
    assert "group ends: 2 edges, A_B, C_D" in shown
    assert [line.split()[0] for line in shown.splitlines() if "(0 %)" in line] == ["A_B", "C_D"]
    groups_file(data).unlink()
    data.write_text(data.read_text().replace("A_B", "[red]A[/red]"))
    shown = succeeded(describe, data, "--forget-edge", "[red]A[/red]")
    assert shown.count("[red]A[/red]") == 2  # among all edges, and among those to forget
    asked = "no edge A_B: name what is to be forgotten with --forget-edge"
    assert asked in succeeded(describe, data)


def test_the_word_on_how_a_file_is_read_stands_in_card_and_plan(tmp_path: Path) -> None:
    rows = [{"instruction": f"Is {n} odd?", "output": f"Kettle {n}."} for n in range(3)]
    (data := tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    note = "rows.json.gz: the question is 'instruction', the answer is 'output'"
    shown = succeeded(describe, data, "--edge", "all", "--json", card := tmp_path / "card.json")
    assert note in shown.splitlines()
    assert json.loads(card.read_text())["notes"] == [note]
    told = ("--data", data, "--edge", "all", "--retain-data", "mini", "--output", tmp_path / "runs")
    planned = succeeded(search, *told, "--in-process", "--dry-run", "--finetune", "never")
    assert f"note {note}" in " ".join(planned.split())
    assert "rows: forget all (3 questions), retain 96" in planned


def test_long_lists_of_edges_are_cut_and_answers_without_a_word_for_rouge_reported(
    tmp_path: Path,
) -> None:
    rows = [{"edge": f"e{n}", "question": f"{n}?", "answer": f"{n}."} for n in range(15)]
    data = tmp_path / "p.json"
    data.write_text(json.dumps([*rows, GREEK]))
    shown = succeeded(describe, data)
    assert "e11 1 and 4 more edges (all of them with --json)" in shown
    assert "1 true answers have no word for the ROUGE tokenizer" in shown
    assert "C_D: 'In Greek?' -> 'αβγ'. Give --rouge-tokenizer words" in " ".join(shown.split())
    assert "ROUGE" not in succeeded(describe, data, "--rouge-tokenizer", "words")


def test_tokens_are_those_of_the_models_own_tokenizer(
    tmp_path: Path, checkpoint: Callable[..., Path], loaded: Callable[..., LoadedModel]
) -> None:
    target = tmp_path / "card.json"
    data = small_data(tmp_path)
    shown = succeeded(describe, data, "--model", checkpoint("qwen2"), "--json", target)
    assert "question in tokens" in shown
    counts = [
        len(loaded("qwen2").tokenizer.encode(row["answer"], add_special_tokens=False))
        for row in json.loads(data.read_text())
    ]
    tokens = json.loads(target.read_text())["tokens"]["answer"]
    assert (tokens["least"], tokens["most"]) == (min(counts), max(counts))
    prompt = (
        "forget prompt: <|bos|><|im_start|>user\\nWhat is item 0 of A_B?<|im_end|>\\n<|im_start|>"
    )
    assert prompt in shown
    assert "retain prompt: … What is item 0 of B_C? …" in shown
    (tmp_path / "mine.jinja").write_text("Q: {{ messages[-1].content }}")
    told = ("--model", checkpoint("qwen2"), "--chat-template", tmp_path / "mine.jinja")
    assert "forget prompt: Q: What is item 0 of A_B?[answer]" in succeeded(describe, data, *told)
    (tmp_path / "mine.jinja").write_text("{{ raise_exception('no such turn') }}")
    assert "no prompt: the chat template of" in succeeded(describe, data, *told)


def test_prompts_are_told_from_pairs_by_suffix_and_first_row(tmp_path: Path) -> None:
    for name, content in (
        ("a.json", '[{"instruction": "Say no."}]'),
        ("b.json", '["Say no."]'),
        ("c.txt", "Say no.\n"),
    ):
        (tmp_path / name).write_text(content)
        assert "1 prompts, SHA-256" in succeeded(describe, tmp_path / name)
        message = refused(describe, tmp_path / name, "--forget-edge", "A_B")
        assert "holds prompts, no edges" in message


def test_mistakes_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = small_data(tmp_path)
    for option, value, expected in (
        ("--forget-edge", "Q", "unknown forget edge 'Q'"),
        ("--forget-edge", " ,", "no forget edge was given"),
        ("--json", ".", "is a folder, not a file"),
        ("--json", "pairs.json/card.json", "is a file, not a folder"),
        ("--rouge-tokenizer", "none", "must be one of default, words"),
        ("--model", ".", "is not on this machine"),
        ("--model", "tiny", "is built on first use"),
        ("--model", "nothing", "unknown model"),
    ):
        assert expected in refused(describe, data, option, value)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as state:
        state.files = {PISTOL_2: pistol_rows(), f"{HUB}/full.json": tofu_lines()}
        yield state


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUNAR_TUNE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def fetched(server: FileServer, *arguments: str) -> Result:
    urls = {"LUNAR_TUNE_GITHUB_URL": server.url, "HF_ENDPOINT": server.url}
    return without_ray(fetch, *arguments, **urls)


def test_without_names_everything_is_listed_and_nothing_fetched(folder: Path) -> None:
    result = without_ray(fetch)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1 : len(PUBLISHED) + 1]] == list(PUBLISHED)
    assert lines[-1] == f"kept in {folder}"
    assert "from https://huggingface.co/datasets/locuslab/TOFU/tree/324592d8" in result.stdout
    assert not folder.exists()


def test_names_are_fetched_once_from_the_servers_that_the_environment_names(
    folder: Path, server: FileServer
) -> None:
    result = fetched(server, "pistol-2", "tofu", "tofu")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"pistol-2: 1500 rows, checksum recorded, {folder / 'pistol-2.json'}",
        f"tofu: 4000 rows, checksum recorded, {folder / 'tofu.json'}",
    ]
    assert server.asked == [PISTOL_2, f"{HUB}/full.json"]
    listed = {line.split()[0]: line for line in without_ray(fetch).stdout.splitlines()}
    assert "MIT     yes" in listed["tofu"]
    assert "MIT     yes" not in listed["pistol-1"]
    assert "pistol-2: is there already" in fetched(server, "pistol-2").stdout
    assert len(server.asked) == 2
    (folder / "pistol-2.json").write_text("[]")
    result = fetched(server, "pistol-2")
    assert result.exit_code == 2
    assert "no longer, what was fetched. --force replaces it" in result.stderr
    assert (folder / "pistol-2.json").read_text() == "[]"
    result = fetched(server, "pistol-2", "--force", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (folder / "pistol-2.json").read_bytes() == pistol_rows()


def test_unknown_names_are_refused_before_and_others_after_the_rest_is_fetched(
    folder: Path, server: FileServer
) -> None:
    result = fetched(server, "pistol-2", "tofuu", "lunar")
    assert result.exit_code == 2
    assert "2 things are wrong" in result.stderr
    assert "unknown published data set 'tofuu'. Did you mean 'tofu" in result.stderr
    assert server.asked == []
    del server.files[PISTOL_2]
    result = fetched(server, "pistol-2", "tofu", "lunar-harmful")
    assert result.exit_code == 2
    assert "2 things are wrong" in result.stderr
    assert result.stderr.count("(404)") == 2
    assert (folder / "tofu.json").is_file()


def test_the_script_hands_its_arguments_to_the_command() -> None:
    script = Path(__file__).parents[2] / "scripts" / "fetch_datasets"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == '.venv/bin/python -m lunar_tune.fetch "$@"'


def test_models_are_listed_with_what_each_costs(tmp_path: Path) -> None:
    """8 billion parameters of two bytes, .27 for a fit, and half a GiB more: 17.4 GiB."""
    lines = {line.split()[0]: line.split() for line in succeeded(models, columns=120).splitlines()}
    assert lines["llama3.1-8b"][4:8] == ["17.4", "GiB", "llama3.1", "*"]
    assert lines["qwen3-8b"][6:] == ["Apache-2.0", "Qwen/Qwen3-8B"]
    succeeded(models, "--json", tmp_path / "models.json")
    assert json.loads((tmp_path / "models.json").read_text())["smollm2-135m"]["n_layers"] == 30
