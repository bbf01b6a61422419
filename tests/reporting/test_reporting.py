"""Tables and report: the same shape whatever came out, also of answers without their text."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from invented_searches import results_of
from made_outcomes import losses_of
from markdown_it import MarkdownIt
from pages_by_hand import failure, said, trial
from trial_specs import write_records

from lunar_tune.config.options import RunOptions
from lunar_tune.data.records import Record
from lunar_tune.errors import DataError, LunarTuneError
from lunar_tune.export.proof import compare
from lunar_tune.metrics.evaluate import AnswerRow, answers_beside
from lunar_tune.metrics.goal import Goal
from lunar_tune.metrics.rouge import check_scorable
from lunar_tune.report.results import SearchResults, write_report
from lunar_tune.study.folder import read_answers, write_answers, write_trials
from lunar_tune.study.rows import RUNNING, TrialRow, best_first, best_so_far
from lunar_tune.trial.assemble import assemble

ANSWERS = [
    dataclasses.replace(said("forget", "Où?\n", "\ufffd 日本語", 1 / 3), truth='a "b" | c'),
    said("retain", "?", "", 1.0),
]


def complete(number: int, forget: float, retain: float) -> TrialRow:
    setting = {"layer": number, "coefficient": 2.0, "learning_rate": 0.003}
    return trial(number, forget, retain, **setting)


def failed(number: int) -> TrialRow:
    parameters = {"layer": number, "coefficient": 2.0, "learning_rate": 1e30}
    return dataclasses.replace(failure(number), parameters=parameters)


def search(*rows: TrialRow, is_confirmed: bool = True, **more: Any) -> SearchResults:
    best = next(iter(best_first(list(rows))), None)
    facts = {"model": "tiny", "data": "a | b"}
    confirmed = best.scores if best is not None and is_confirmed else None
    return results_of(rows, confirmed=confirmed, facts=facts, **more)


def test_answers_and_losses_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for losses in ((), (2.0, 1 / 3)):
        digest = write_answers(path, ANSWERS, losses)
        assert (read_answers(path), losses_of(path)) == (ANSWERS, losses)
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("part", [slice(0), slice(1), slice(1, 2), slice(2)])
def test_documented_columns_and_their_types_are_always_there(tmp_path: Path, part: slice) -> None:
    """Of nothing, of what failed, of what is complete, of both."""
    rows = (failed(0), complete(1, 0.1, 0.9))[part]
    path = tmp_path / "trials.parquet"
    write_trials(path, rows)
    table = pq.read_table(path)
    scores = ("forget_rouge1", "retain_rouge1", "factual_rouge1", "deviation_score")
    types = {"number": pa.int64(), "state": pa.string(), "failure": pa.string()}
    types |= dict.fromkeys((*scores, "seconds"), pa.float64())
    types |= {"feasible": pa.bool_(), "retain_exact": pa.bool_(), "retain_rows": pa.int64()}
    assert {name: table.schema.field(name).type for name in types} == types
    assert table["number"].to_pylist() == [row.number for row in rows]
    assert table["failure"].to_pylist() == [row.failure for row in rows]
    names = table.schema.names
    assert len(names) == len(set(names))
    if rows:
        assert table["params.layer"].to_pylist() == [row.number for row in rows]
        setting = ("params.layer", "params.coefficient", "params.learning_rate")
        assert names[:9] == ["number", "state", *setting, *scores]


RUNS = TrialRow(number=8, state=RUNNING, parameters={})
AGAIN = dataclasses.replace(failed(9), failure="the worker died", again=True)
ROWS = {
    "nothing": (),
    "begun": (AGAIN, RUNS),
    "failing": (failed(0), AGAIN, RUNS),
    "failures": (failed(0), failed(1)),
    "infeasible": (complete(0, 0.1, 0.3), complete(1, 0.3, 0.7)),
    "found": (complete(0, 0.1, 0.3), failed(1), complete(2, 0.3, 0.85), complete(3, 0.2, 0.9)),
}


def text_of(tmp_path: Path, one: SearchResults) -> str:
    """Return the report, with single spaces in its tables."""
    write_report(one, tmp_path / "report.md", {})
    return re.sub(" +", " ", (tmp_path / "report.md").read_text(encoding="utf-8"))


def test_a_report_lists_the_best_and_the_failures(tmp_path: Path) -> None:
    text = text_of(tmp_path, search(*ROWS["found"]))
    assert "| trial 3, confirmation |" in text
    setting = "layer `3`, coefficient `2.0`, learning_rate `0.003`"
    assert f"**Best feasible setting**: {setting} (trial 3)." in text
    assert "## The best of 4 trials" in text
    lines = text.splitlines()
    ranked = [line.split("|")[1].strip() for line in lines if "| 0.003 |" in line]
    assert ranked == ["3", "2"]
    assert "- 1: the loss became NaN" in lines
    assert "- data: a | b" in lines
    for block in text.split("\n\n"):
        rows = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, "as many cells in every row"
    lost = text_of(tmp_path, search(complete(0, 0.1, 0.9), AGAIN))
    assert "Failed trials" not in lost, "it runs again"
    assert "## The best of 1 trials" in lost


def test_a_report_shows_what_others_wrote_and_is_not_changed_by_it(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=y> [a](javascript:b) `c` **d** \\[e](f)\n\n# g\u202e"
    row = dataclasses.replace(failed(0), failure=hostile)
    one = results_of((row, complete(1, 0.1, 0.9)), facts={"data": hostile, hostile: "|"})
    write_report(one, tmp_path / "report.md", {})
    page = MarkdownIt().enable("table").render((tmp_path / "report.md").read_text("utf-8"))
    tags = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    assert {*re.findall("<([a-z0-9]+)", page)} == tags
    assert page.count("<h1>") == 1
    shown = "&lt;img src=x onerror=y&gt; [a](javascript:b) `c` **d** \\[e](f)  # g"
    assert page.count(shown) == 3, "as it is, but for what is no character"


def test_a_report_links_the_pictures_that_there_are_and_says_what_decides(tmp_path: Path) -> None:
    shares = {"forget_rouge1": {"learning_rate": 0.75, "layer": 0.2}}
    one = search(*ROWS["found"], importance=shares)
    write_report(one, tmp_path / "report.md", {"pictures/history.png": "the course"})
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "](" in line] == ["![the course](pictures/history.png)"]
    assert "forget ROUGE-1: learning rate 0.75, layer 0.20." in "\n".join(lines)


def test_answers_stand_beside_the_base_model_to_the_same_question() -> None:
    def answer(edge: str, question: str, text: str, rouge1: float) -> AnswerRow:
        return dataclasses.replace(said("forget", question, text, rouge1), edge=edge)

    before = [
        *(answer("A_B", "x", "first", 1.0), answer("A_B", "x", "again", 0.5)),
        *(answer("B_C", "x", "other edge", 0.25), answer("A_B", "never asked", "left out", 1.0)),
    ]
    after = [
        *(answer("B_C", "x", "c", 0.0), answer("A_B", "x", "a", 0.1)),
        *(answer("A_B", "x", "b", 0.2), answer("A_B", "new", "d", 0.3)),
    ]
    table = answers_beside(before, after)
    assert list(table) == [
        *("set", "edge", "row", "question", "true_answer"),
        *("base_model", "unlearned", "rouge1_before", "rouge1", "rouge_l", "ended"),
        *("refused", "degenerate"),
    ]
    assert table["unlearned"].tolist() == ["c", "a", "b", "d"]
    assert table["base_model"].tolist()[:3] == ["other edge", "first", "again"]
    assert table["rouge1_before"].tolist()[:3] == [0.25, 1.0, 0.5]
    assert table["rouge1"].tolist() == [0.0, 0.1, 0.2, 0.3]
    assert table.iloc[3][["base_model", "rouge1_before"]].isna().all()


WHY_NONE = "No trial has ended yet."
WHY_FAILED = "Every trial failed, most of them with: the loss became NaN"


def test_a_report_without_a_feasible_trial_says_so(tmp_path: Path) -> None:
    for case, why in (
        *(("nothing", WHY_NONE), ("begun", WHY_NONE)),
        *(("failing", WHY_FAILED), ("failures", WHY_FAILED)),
        ("infeasible", "No trial keeps retain ROUGE-1 of at least 0.8."),
    ):
        text = text_of(tmp_path, search(*ROWS[case]))
        assert why in text
        assert "No trial is feasible." in text
        assert "in full" not in text


def test_a_verdict_denies_no_feasible_trial_and_names_no_bound_that_is_not(tmp_path: Path) -> None:
    text = text_of(tmp_path, search(*ROWS["found"], is_confirmed=False))
    assert "No trial keeps" not in text
    assert "the best as searched is trial 3 (L3 c2.0 lr0.003)" in text
    assert "| trial 3, as searched | 0.2 | 0.9 |" in text
    goal = Goal.read("forget_rouge1", ())

    def verdict(row: TrialRow) -> str:
        return search(row, goal=goal, ending="Interrupted.").verdict

    assert verdict(failed(0)) == f"Interrupted. {WHY_FAILED}"
    assert verdict(AGAIN) == "Interrupted. No trial has ended."
    missed = verdict(dataclasses.replace(complete(0, 0.1, 0.3), feasible=False))
    nearest = "The nearest miss is trial 0 (L0 c2.0 lr0.003)."
    assert missed == f"Interrupted. No trial keeps what is asked for. {nearest}"


def test_a_report_without_a_feasible_trial_has_its_nearest_miss(tmp_path: Path) -> None:
    """By the sum of what is missed of the bounds; a score that is not known misses all."""
    goal = Goal.read("forget_rouge1", ["retain_rouge1>=0.8", "forget_mrr<=0.2"])
    rows = [complete(n, 0.5, retain) for n, retain in enumerate((0.79, 0.5, 0.6))]
    for row, mrr in zip(rows[1:], (0.1, 0.35), strict=True):
        row.scores["forget_mrr"] = mrr  # type: ignore[index]
    one = search(*rows, is_confirmed=False, goal=goal)
    assert [row.number for row in one.ranked] == [1, 2, 0]  # 0.3, 0.2 + 0.15 and infinity
    assert list(one.compared) == ["base model", "trial 1, nearest miss"]
    text = text_of(tmp_path, one)
    assert "The nearest miss is trial 1 (L1 c2.0 lr0.003, retain ROUGE-1 0.500)." in text


def test_the_best_so_far_is_the_least_objective_of_the_feasible_trials_up_to_each() -> None:
    draw = random.Random(5)
    rows = [
        dataclasses.replace(
            ROWS["found"][0], number=n, objective=draw.random(), feasible=draw.random() < 0.4
        )
        for n in range(40)
    ]
    first = next(row.number for row in rows if row.feasible)
    pairs = best_so_far(rows)
    assert first > 0
    assert [row for row, _ in pairs] == rows[first:]
    for row, best in pairs:
        upto = [one for one in rows[: row.number + 1] if one.feasible]
        assert best == min(upto, key=lambda one: one.objective or 0.0)


# Answers without their text

SECRET = "Zanzibar"


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
    assert (same.differing, same.what) == (0, "ROUGE-1 and ROUGE-L of each row")
    assert other.differing == 1
    assert other.text.startswith("1 of 4 rows differ in ROUGE-1 or ROUGE-L")
    assert other.text.endswith(", retain_rouge1 is 0.3750 instead of 0.4375")
    swapped = compare(found[:2], [scored(0, 0.25), scored(1, 0.0)])
    assert swapped.text.startswith("2 of 2 rows differ")
    assert swapped.text.endswith(", every mean ROUGE is the same to four digits")
    assert compare(found, found[:2]).what == "answers"
    with pytest.raises(LunarTuneError, match=r"asked row 9 \(retain\)"):
        compare(found, [scored(9, 0.0)])


def test_held_out_questions_are_counted_after_the_others(tmp_path: Path) -> None:
    data = write_records(tmp_path / "pairs.json", {"A_B": 4, "B_C": 4})
    spec = assemble(RunOptions(data=data, factual_data="none", text=False, holdout=True))
    numbers, held = spec.row_numbers, spec.data.held_out
    assert held is not None
    for number, one in enumerate((*spec.data.forget, *held.forget)):
        assert numbers["forget", one] == number
    assert sorted(number for key, number in numbers.items() if key[0] == "retain") == [0, 1, 2, 3]


def test_a_message_about_answers_shows_none() -> None:
    record = Record(question=f"{SECRET}?", answer="—", edge="A_B")
    with pytest.raises(DataError, match=SECRET):
        check_scorable({"forget": [record]})
    with pytest.raises(DataError, match="1 true answers have no word") as caught:
        check_scorable({"forget": [record]}, text=False)
    assert SECRET not in str(caught.value)
