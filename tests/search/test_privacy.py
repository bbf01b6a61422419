"""What a search must not write down: secrets ever, and texts of the data with --no-text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_lines import Result, small_data, without_ray

from lunar_tune.cli.search import search as COMMAND
from lunar_tune.report.results import SearchResults

SENTINEL = "s3nt1nel"
SECRETS = (
    *("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN"),
)


@dataclass(frozen=True)
class Private:
    """A search that has ended."""

    done: Result
    output: Path

    def holding(self, text: str) -> list[str]:
        """Return where a text stands: files below the output, names of files, the screen."""
        files = [path for path in self.output.rglob("*") if path.is_file()]
        found = [str(path) for path in files if text.encode() in path.read_bytes()]
        found += [str(path) for path in files if text in str(path.relative_to(self.output))]
        return found + ["the screen"] * (text in self.done.output)


@pytest.fixture(scope="module")
def private(
    tmp_path_factory: pytest.TempPathFactory, small: list[str], empty_store: Callable[[Path], Path]
) -> Private:
    """A search in this process: what Ray writes lies elsewhere and ends with it."""
    output = tmp_path_factory.mktemp("private") / "runs"
    empty_store(output / "mlflow.db")
    options = ("--in-process", "--force", "--num-trials", "2", "--no-text", "--seed", "1")
    place = ("--output", output, "--name", "n", "--constrain", "retain_rouge1>=0")
    secrets = {name: f"{SENTINEL}-{name.lower()}" for name in SECRETS}
    done = without_ray(COMMAND, *small, *options, *place, **secrets)
    assert done.exit_code == 0, done.stderr
    return Private(done, output)


@pytest.mark.parametrize("text", [SENTINEL, "What is item", "Kettle"])
def test_nothing_private_is_written_or_shown(private: Private, text: str) -> None:
    assert "forget answers end by themselves" in private.done.stdout, "answers were looked at"
    assert private.holding("retain_rouge1"), "the search for a text finds one that is there"
    assert private.holding(text) == []


def test_answers_have_numbers_in_the_place_of_texts(private: Private, tmp_path: Path) -> None:
    data = json.loads(small_data(tmp_path).read_text())
    sets = {"forget": ["A_B"], "retain": ["B_C", "C_D"]}
    for name in ("baseline", "00000", "00001"):
        rows = pq.read_table(private.output / f"n/trials/{name}.parquet").to_pylist()
        assert [row["row"] for row in rows] == [0, 1, 2, *range(6)]
        for row in rows:
            assert set(row) == {"set_name", "edge", "row", "rouge1", "rouge_l", "ended"}
            pairs = [pair for pair in data if pair["edge"] in sets[row["set_name"]]]
            assert pairs[row["row"]]["edge"] == row["edge"]
    answers = SearchResults.read(private.output / "n").answer_rows(0)
    assert {(row.question, row.truth, row.answer) for row in answers} == {("", "", "")}
    tables = list(private.output.glob("mlartifacts/**/answers.json"))
    assert len(tables) == 2
    for table in tables:
        assert json.loads(table.read_text())["columns"] == ["set", "edge", "rouge1"]
