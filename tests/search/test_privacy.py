"""What a search must not write down: secrets ever, and texts of the data with --no-text."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_lines import SMALL_SPACE, run_command, small_data

from lunar_tune.report.results import SearchResults

pytestmark = pytest.mark.slow  # a search of its own

SENTINEL = "s3nt1nel"
SECRETS = {
    name: f"{SENTINEL}-{name.lower()}"
    for name in (
        *("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN"),
    )
}


@dataclass(frozen=True)
class Private:
    """A search that has ended."""

    done: subprocess.CompletedProcess[str]
    output: Path

    def holding(self, text: str) -> list[str]:
        """Return where a text stands: files below the output, names of files, the screen."""
        files = [path for path in self.output.rglob("*") if path.is_file()]
        found = [str(path) for path in files if text.encode() in path.read_bytes()]
        found += [str(path) for path in files if text in str(path.relative_to(self.output))]
        return found + ["the screen"] * (text in self.done.stdout + self.done.stderr)


@pytest.fixture(scope="module")
def private(
    tmp_path_factory: pytest.TempPathFactory, small: list[str], empty_store: Callable[[Path], Path]
) -> Private:
    cwd = tmp_path_factory.mktemp("private")
    empty_store(cwd / "runs" / "mlflow.db")
    space = cwd / "space.yaml"
    space.write_text(SMALL_SPACE, encoding="utf-8")
    options = ("--space", str(space), "--force", "--num-trials", "2", "--no-text", "--seed", "1")
    place = ("--output", str(cwd / "runs"), "--name", "n", "--constrain", "retain_rouge1>=0")
    done = run_command("search", *small, *options, *place, cwd=cwd, **SECRETS)
    return Private(done, cwd / "runs")


def test_a_search_without_text_finds_and_confirms_as_any_other(private: Private) -> None:
    assert private.done.returncode == 0, private.done.stderr
    assert (private.output / "n/best.yaml").is_file()


@pytest.mark.parametrize("text", [SENTINEL, "What is item", "Kettle"])
def test_nothing_private_is_written_or_shown(private: Private, text: str) -> None:
    assert private.holding("retain_rouge1"), "the search for a text finds one that is there"
    assert private.holding(text) == []


def test_answers_have_numbers_in_the_place_of_texts(private: Private, tmp_path: Path) -> None:
    names = ("baseline", "00000", "00001")
    for name in names:
        rows = pq.read_table(private.output / f"n/trials/{name}.parquet").to_pylist()
        assert [row["row"] for row in rows] == [0, 1, 2, *range(6)]
        assert all(set(row) == {"set_name", "edge", "row", "rouge1", "rouge_l"} for row in rows)
        data = json.loads(small_data(tmp_path).read_text())
        sets = {"forget": ["A_B"], "retain": ["B_C", "C_D"]}
        for row in rows:
            pairs = [pair for pair in data if pair["edge"] in sets[row["set_name"]]]
            assert pairs[row["row"]]["edge"] == row["edge"]
    answers = SearchResults.read(private.output / "n").answer_rows(0)
    assert {(row.question, row.truth, row.answer) for row in answers} == {("", "", "")}


def test_mlflow_has_scores_by_row_only(private: Private) -> None:
    tables = list(private.output.glob("mlartifacts/**/answers.json"))
    assert len(tables) == 2
    for table in tables:
        assert json.loads(table.read_text())["columns"] == ["set", "edge", "rouge1"]
