"""The answers of a search on disk: a file an evaluation, texts only where they are wanted."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
from made_outcomes import losses_of, rows_of, trial_result

from lunar_tune.study.answers import read_answers, write_result
from lunar_tune.study.folder import Folder
from lunar_tune.trial.worker import TrialResult


def result_of(*, fitted: bool = True, **answers: str) -> TrialResult:
    """Return a result with these answers by question."""
    made = trial_result(0.2, 0.9)
    evaluation = dataclasses.replace(made.evaluation, rows=rows_of(answers))
    return dataclasses.replace(made, evaluation=evaluation, losses=made.losses if fitted else ())


def test_each_evaluation_has_a_file_of_its_own(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    write_result(folder.answers(None), result_of(fitted=False, first="base"))
    write_result(folder.answers(None, full=True), result_of(fitted=False, first="held"))
    digest = write_result(folder.answers(7), result_of(first="trial", second="more"))
    write_result(folder.answers(7, full=True), result_of(first="full"))
    assert digest == hashlib.sha256(folder.answers(7).read_bytes()).hexdigest()
    assert {
        path.name: ([row.answer for row in read_answers(path)], losses_of(path))
        for path in (folder.path / "trials").iterdir()
    } == {
        "baseline.parquet": (["base"], ()),
        "baseline-full.parquet": (["held"], ()),
        "00007.parquet": (["trial", "more"], (2.0, 1.0)),
        "00007-full.parquet": (["full"], (2.0, 1.0)),
    }


@pytest.mark.parametrize("text", [True, False])
def test_texts_are_written_where_they_may_be(tmp_path: Path, text: bool) -> None:
    file = Folder(tmp_path).answers(0)
    digest = write_result(file, result_of(secretive="kettles"), text=text)
    (row,) = read_answers(file)
    assert (row.question, row.answer) == (("secretive", "kettles") if text else ("", ""))
    assert row.edge == "A_B"
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_same_answers_have_the_same_digest_and_a_later_file_wins(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    first = write_result(folder.answers(0), result_of(first="a"))
    assert write_result(folder.answers(1), result_of(first="a")) == first
    assert write_result(folder.answers(0), result_of(first="b")) != first
    (row,) = read_answers(folder.answers(0))
    assert row.answer == "b"
    assert len(list((tmp_path / "trials").iterdir())) == 2, "no file is left half written"
