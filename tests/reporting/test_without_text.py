"""Answers without their text: what is kept, and what readers make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_outcomes import losses_of

from lunar_tune.config.options import RunOptions
from lunar_tune.data.records import Record
from lunar_tune.errors import DataError, LunarTuneError
from lunar_tune.export.proof import compare
from lunar_tune.metrics.evaluate import AnswerRow, answers_beside
from lunar_tune.metrics.rouge import check_scorable
from lunar_tune.study.folder import read_answers, write_answers
from lunar_tune.trial.assemble import assemble

SECRET = "Zanzibar"


def test_rows_have_numbers_and_scores_and_no_text(tmp_path: Path) -> None:
    place = {"set_name": "forget", "edge": "A_B", "row": 7, "ended": True}
    scored = {**place, "rouge1": 0.5, "rouge_l": 0.25}
    texts = {"question": f"{SECRET}?", "truth": f"{SECRET}!", "answer": f"{SECRET}."}
    row = AnswerRow(**scored, **texts)  # type: ignore[arg-type]
    path = tmp_path / "answers.parquet"
    write_answers(path, [row], [1.0], text=False)
    assert SECRET.encode() not in path.read_bytes()
    assert pq.read_table(path).to_pylist() == [scored]
    assert read_answers(path) == [AnswerRow(**scored, question="", truth="", answer="")]  # type: ignore[arg-type]
    assert losses_of(path) == (1.0,)


def scored(row: int, rouge1: float, *, text: bool = False, set_name: str = "retain") -> AnswerRow:
    """Return an answer of which only its number tells which question it is to."""
    word = f"{SECRET} {row}" if text else ""
    texts = {"question": word, "truth": word, "answer": word}
    return AnswerRow(set_name=set_name, edge="A_B", rouge1=rouge1, rouge_l=rouge1, row=row, **texts)


def test_answers_without_texts_stand_beside_those_of_the_same_row() -> None:
    before = [scored(row, 1.0 - row / 10) for row in range(4)]
    after = [scored(3, 0.7), scored(1, 0.5), scored(9, 0.0)]
    table = answers_beside(before, after)
    assert table["row"].tolist() == [3, 1, 9]
    assert table["rouge1_before"].tolist()[:2] == [0.7, 0.9]
    assert table["rouge1_before"].isna().tolist() == [False, False, True]


def test_an_export_is_compared_with_scores_where_texts_were_not_kept() -> None:
    found = [scored(row, row / 4, text=True) for row in range(4)]
    kept = [scored(row, row / 4) for row in (2, 0, 3)]
    same, other = compare(found, kept), compare(found, [*kept, scored(1, 0.5)])
    assert (same.n_rows, same.differing, same.by_text) == (3, 0, False)
    assert other.differing == 1
    assert "1 of 4 rows differ in ROUGE-1 or ROUGE-L" in other.text
    assert compare(found, found[:2]).by_text
    with pytest.raises(LunarTuneError, match=r"asked row 9 \(retain\)"):
        compare(found, [scored(9, 0.0)])


def private(folder: Path, **changes: bool) -> RunOptions:
    pairs = [
        {"edge": edge, "question": f"{edge} {n}?", "answer": f"{edge} {n}!"}
        for edge in ("A_B", "B_C")
        for n in range(4)
    ]
    path = folder / "pairs.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return RunOptions(data=str(path), factual_data="none", text=False, **changes)  # type: ignore[arg-type]


def test_numbers_count_the_rows_of_a_set(tmp_path: Path) -> None:
    numbers = assemble(private(tmp_path)).row_numbers
    assert len(numbers) == 8
    for n in range(4):
        assert numbers["forget", Record(f"A_B {n}?", f"A_B {n}!", "A_B")] == n
        assert numbers["retain", Record(f"B_C {n}?", f"B_C {n}!", "B_C")] == n


def test_held_out_questions_are_counted_after_the_others(tmp_path: Path) -> None:
    spec = assemble(private(tmp_path, holdout=True))
    numbers, held = spec.row_numbers, spec.data.held_out
    assert held is not None
    for number, one in enumerate((*spec.data.forget, *held.forget)):
        assert numbers["forget", one] == number
    assert sorted(number for key, number in numbers.items() if key[0] == "retain") == [0, 1, 2, 3]


def test_a_message_about_answers_shows_none() -> None:
    record = Record(question=f"{SECRET}?", answer="—", edge="A_B")
    with pytest.raises(DataError, match=SECRET):
        check_scorable([record])
    with pytest.raises(DataError, match="1 true answers have no word") as caught:
        check_scorable([record], text=False)
    assert SECRET not in str(caught.value)
