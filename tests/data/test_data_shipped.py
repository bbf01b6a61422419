"""The shipped files: their sizes and shapes, and that their seeds still give them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lunar_tune.data.data_catalog import BUNDLED, bundled_names, resolve_data
from lunar_tune.data.records import Record, read_prompts, read_records
from lunar_tune.data.splits import edges_of, split_by_edges
from lunar_tune.files import datasets_dir

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_datasets.py"
RECORD_NAMES = bundled_names("records")


def records_of(name: str) -> tuple[Record, ...]:
    return read_records(resolve_data(name, kind="records"))


@pytest.fixture
def make_datasets() -> Callable[[list[str]], int]:
    """Return the script's `main`."""
    spec = importlib.util.spec_from_file_location("make_datasets", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], int] = module.main
    return main


def test_the_seeds_give_the_shipped_files_byte_for_byte(
    make_datasets: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_datasets(["--check"]) == 0
    assert capsys.readouterr().out == ""


def test_the_check_names_a_file_that_differs_or_is_missing(
    make_datasets: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--folder", str(tmp_path / "new")]
    assert make_datasets(folder) == 0
    assert make_datasets([*folder, "--check"]) == 0
    mini = tmp_path / "new" / "mini.json"
    mini.write_bytes(mini.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "new" / "contracts.json").unlink()
    capsys.readouterr()
    assert make_datasets([*folder, "--check"]) == 1
    said = capsys.readouterr().out
    assert "mini.json differs" in said
    assert "contracts.json differs" in said
    assert "unverifiable.json" not in said


def test_mini_has_eight_edges_of_twelve_pairs() -> None:
    edges = edges_of(records_of("mini"))
    assert list(edges) == ["A_B", "B_C", "C_D", "E_F", "E_g", "E_h", "I_J", "K_m"]
    assert set(edges.values()) == {12}


def test_contracts_have_the_published_size() -> None:
    edges = edges_of(records_of("contracts"))
    assert len(edges) == 20
    assert set(edges.values()) == {20}


def test_factual_has_topics_for_edges_and_plain_answers() -> None:
    records = records_of("factual")
    assert len(records) == 81
    assert {"geography", "science", "literature", "history"} < set(edges_of(records))
    assert all(re.fullmatch(r"[A-Za-z0-9 ]+", record.answer) for record in records)
    assert all(len(record.answer.split()) <= 4 for record in records)


@pytest.mark.parametrize("name", RECORD_NAMES)
def test_no_question_repeats_and_every_answer_has_a_word_for_rouge(name: str) -> None:
    records = records_of(name)
    assert len({record.question.casefold() for record in records}) == len(records)
    assert all(re.search("[a-z0-9]", record.answer.lower()) for record in records)


@pytest.mark.parametrize("name", RECORD_NAMES)
def test_every_single_edge_can_be_forgotten(name: str) -> None:
    records = records_of(name)
    for edge, count in edges_of(records).items():
        assert len(split_by_edges(records, [edge]).forget) == count


@pytest.mark.parametrize(("name", "count"), [("unverifiable", 200), ("harmful", 64)])
def test_reference_prompts_are_short_and_different(name: str, count: int) -> None:
    prompts = read_prompts(resolve_data(name, kind="prompts"))
    assert len(prompts) == len({prompt.casefold() for prompt in prompts}) == count
    assert max(len(prompt.split()) for prompt in prompts) <= 14


def test_there_are_ten_refusals() -> None:
    refusals = read_prompts(resolve_data("refusals", kind="prompts"))
    assert len(refusals) == len(set(refusals)) == 10
    assert all(refusal.endswith(".") for refusal in refusals)


def test_the_sets_do_not_share_invented_names() -> None:
    def invented(texts: list[str]) -> set[str]:
        inner = (text.split(" ", 1)[1] for text in texts)
        return {word for text in inner for word in re.findall(r"\b[A-Z][a-z]{3,}", text)}

    prompts = invented(list(read_prompts(resolve_data("unverifiable", kind="prompts"))))
    mini = invented([record.question for record in records_of("mini")])
    contracts = invented([record.question for record in records_of("contracts")])
    assert not prompts & (mini | contracts)
    assert mini & contracts <= {"Corp", "Group", "Works"}


def test_the_folder_holds_the_named_files_and_no_python() -> None:
    """A Python file would let the folder shadow the package `datasets`."""
    files = {path.name for path in datasets_dir().iterdir()}
    assert files == {file_name for _, file_name in BUNDLED.values()} | {"README.md"}


def test_json_files_are_indented_utf8_with_a_final_newline() -> None:
    for path in datasets_dir().glob("*.json"):
        text = path.read_bytes().decode("utf-8")
        assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
