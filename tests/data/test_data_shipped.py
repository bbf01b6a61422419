"""The shipped files: their sizes and shapes, and that their seeds still give them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import make_datasets
import pytest

from lunar_tune.data.data_catalog import BUNDLED, bundled_names, resolve_data
from lunar_tune.data.records import Record, read_prompts, read_records
from lunar_tune.data.splits import edges_of, split_by_edges
from lunar_tune.files import datasets_dir


def records_of(name: str) -> tuple[Record, ...]:
    return read_records(resolve_data(name, kind="records"))


def prompts_of(name: str) -> tuple[str, ...]:
    return read_prompts(resolve_data(name, kind="prompts"))


def test_the_seeds_give_the_shipped_files_and_the_check_names_one_that_differs_or_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_datasets.main(["--check"]) == 0
    assert capsys.readouterr().out == ""
    folder = ["--folder", str(tmp_path / "new")]
    assert make_datasets.main(folder) == 0
    mini = tmp_path / "new" / "mini.json"
    mini.write_bytes(mini.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "new" / "contracts.json").unlink()
    capsys.readouterr()
    assert make_datasets.main([*folder, "--check"]) == 1
    said = capsys.readouterr().out
    assert "mini.json differs" in said
    assert "contracts.json differs" in said
    assert "unverifiable.json" not in said


def test_the_sets_have_the_edges_that_they_are_known_for() -> None:
    """The contracts have the published size."""
    assert edges_of(records_of("mini")) == dict.fromkeys(
        ["A_B", "B_C", "C_D", "E_F", "E_g", "E_h", "I_J", "K_m"], 12
    )
    assert list(edges_of(records_of("contracts")).values()) == [20] * 20
    factual = records_of("factual")
    assert len(factual) == 81
    assert {"geography", "science", "literature", "history"} < set(edges_of(factual))
    assert all(re.fullmatch(r"[A-Za-z0-9 ]+", record.answer) for record in factual)
    assert all(len(record.answer.split()) <= 4 for record in factual)


@pytest.mark.parametrize("name", bundled_names("records"))
def test_no_question_repeats_and_every_edge_can_be_forgotten_and_scored(name: str) -> None:
    records = records_of(name)
    assert len({record.question.casefold() for record in records}) == len(records)
    assert all(re.search("[a-z0-9]", record.answer.lower()) for record in records)
    for edge, count in edges_of(records).items():
        assert len(split_by_edges(records, [edge]).forget) == count


@pytest.mark.parametrize(
    ("name", "count", "end"),
    [("unverifiable", 200, ""), ("harmful", 64, ""), ("refusals", 10, ".")],
)
def test_prompts_are_short_and_different(name: str, count: int, end: str) -> None:
    prompts = prompts_of(name)
    assert len(prompts) == len({prompt.casefold() for prompt in prompts}) == count
    assert max(len(prompt.split()) for prompt in prompts) <= 14
    assert all(prompt.endswith(end) for prompt in prompts)


def test_the_sets_do_not_share_invented_names() -> None:
    def invented(texts: Sequence[str]) -> set[str]:
        inner = (text.split(" ", 1)[1] for text in texts)
        return {word for text in inner for word in re.findall(r"\b[A-Z][a-z]{3,}", text)}

    prompts = invented(prompts_of("unverifiable"))
    mini = invented([record.question for record in records_of("mini")])
    contracts = invented([record.question for record in records_of("contracts")])
    assert not prompts & (mini | contracts)
    assert mini & contracts <= {"Corp", "Group", "Works"}


def test_the_folder_holds_the_named_files_in_plain_json_and_no_python() -> None:
    """A Python file would let the folder shadow the package `datasets`."""
    files = {path.name for path in datasets_dir().iterdir()}
    assert files == {file_name for _, file_name in BUNDLED.values()} | {"README.md"}
    for path in datasets_dir().glob("*.json"):
        text = path.read_bytes().decode("utf-8")
        assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
