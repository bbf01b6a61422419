"""The page of searches: complete in itself, literal in what it shows, true to the rows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from invented_searches import results_of
from pages_by_hand import HOSTILE, Parsed, failure, hostile, many, page_of, said, searched, trial

from lunar_tune.errors import InputError
from lunar_tune.metrics.evaluate import answers_beside
from lunar_tune.metrics.goal import Goal
from lunar_tune.report.findings import Findings
from lunar_tune.report.results import SHOWN, SearchResults, write_static_page
from lunar_tune.study.folder import Folder, write_answers
from lunar_tune.study.rows import COMPLETE, HEADLINE_SCORES, TrialRow

LOADING = {"src", "href", "data", "poster", "srcset", "action", "background"}


def written(folder: Path, *searches: SearchResults) -> Parsed:
    write_static_page(searches, folder / "page.html")
    return Parsed((folder / "page.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parsed]:
    """The page of two searches, of which the first has 20 trials."""
    folder = tmp_path_factory.mktemp("both")
    searches = page_of(folder, *many(20)), page_of(folder, *many(5), name="second")
    return folder / "page.html", written(folder, *searches)


def test_nothing_is_loaded_and_only_the_pages_own_scripts_run(both: tuple[Path, Parsed]) -> None:
    path, parsed = both
    places = [one[name] for _, one in parsed.tags for name in LOADING & set(one)]
    assert all(value and value.startswith(("data:", "#")) for value in places), places
    assert "#search-2" in places
    policy = parsed.policy()
    assert policy.startswith("default-src 'none';")
    digests = [hashlib.sha256(text.encode()).digest() for text in parsed.running]
    known = {base64.b64encode(digest).decode() for digest in digests}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == known
    assert len(known) == len(digests), "libraries are in the page once"
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    assert "unsafe-eval" not in policy
    assert path.stat().st_size < 1_500_000
    titles = re.findall(r"<h3>([^<]*)</h3>", path.read_text(encoding="utf-8"))
    once = ["Result", "Answers", "Charts", "Trials", "What was searched", "Configuration"]
    assert titles == 2 * once


def test_what_others_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    failures = [failure(n) for n in range(1, 7)]
    tame = written(tmp_path, page_of(tmp_path, trial(0, 0.1, 0.9), *failures))
    parsed = written(tmp_path, hostile(tmp_path))
    for text in HOSTILE:
        # Question, truth, both answers, a fact's two sides, a failure, the settings at least.
        assert parsed.text.count(text) >= 8, text
    assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in tame.tags}
    assert parsed.running == tame.running
    for kind, text in parsed.scripts:
        assert kind is None or "<" not in text
    handlers = [name for _, attributes in parsed.tags for name in attributes if name[:2] == "on"]
    assert handlers == []


def test_a_row_shows_and_sorts_by_the_trials_own_numbers(both: tuple[Path, Parsed]) -> None:
    rows, parsed, width = many(20), both[1], 12
    cells = [cell for cell in parsed.cells if cell]
    start = next(
        place
        for place, (order, text) in enumerate(cells)
        if order == "0" and text.strip(" ★") == "0" and cells[place + 1][1] == COMPLETE
    )
    for row in rows:
        mine = cells[start + width * row.number : start + width * (row.number + 1)]
        assert mine[0][0] == str(row.number)
        assert mine[1][1] == row.state
        shown = [float(order) if order else None for order, _ in mine[2:9]]
        scores = [row.scores.get(name) for name in HEADLINE_SCORES]
        assert shown == [*row.parameters.values(), *scores]
        for order, text in mine[2:9]:
            if order:
                assert float(text.strip("≈ ")) == pytest.approx(float(order), rel=5e-4)
        assert mine[6][1].startswith("≈") == (row.retain_exact is False)
        assert mine[9][1] == {True: "yes", False: "no", None: ""}[row.feasible]
        assert mine[11][1] == (row.failure or "")


def test_a_trial_that_runs_again_is_not_counted_with_the_failed_ones(tmp_path: Path) -> None:
    lost = replace(failure(1, "interrupted"), again=True)
    parsed = written(tmp_path, page_of(tmp_path, trial(0, 0.1, 0.9), lost, failure(2)))
    assert "failed (1)" in parsed.text
    assert "failed, runs again" in parsed.text
    (kind,) = [one["data-kind"] for tag, one in parsed.tags if one.get("data-number") == "1"]
    assert kind == "again"


SAMPLED = [
    replace(trial(n, 0.1, 0.9 - n / 5), retain_rows=rows, retain_exact=False)
    for n, rows in enumerate((20, 8, 20))
]
SAMPLE = "from a sample of the questions to keep (20)"
STOPPED = "because it had missed the bound for certain"


def test_an_estimate_from_a_sample_is_not_called_a_stop(tmp_path: Path) -> None:
    for rows, told, untold in (
        ([trial(0, 0.1, 0.9)], "A click on", "≈"),
        ([trial(0, 0.1, 0.9), trial(1, 0.1, 0.5)], STOPPED, "a sample"),
        (SAMPLED[::2], SAMPLE, "stopped"),
        (SAMPLED, f"{SAMPLE}, or from fewer", "≈ from fewer"),
    ):
        text = written(tmp_path, page_of(tmp_path, *rows)).text
        assert told in text
        assert untold not in text


def test_a_page_says_what_came_out_whatever_it_was(tmp_path: Path) -> None:
    for row, expected, n_charts in (
        (None, "No trial has ended yet.", 0),
        (failure(0), "Every trial failed, most of them with: the loss became NaN", 0),
        (trial(0, 0.1, 0.3), "No trial keeps retain ROUGE-1 of at least 0.8.", 2),
        (trial(0, 0.1, 0.9), "confirmed on all questions", 2),
    ):
        parsed = written(tmp_path, page_of(tmp_path, *([row] if row else [])))
        assert expected in parsed.text
        charts = [json.loads(text) for kind, text in parsed.scripts if kind == "application/json"]
        assert len(charts) == n_charts
        assert all(chart["concat"] for chart in charts)


def test_other_goals_have_their_columns(tmp_path: Path) -> None:
    scores = {"retain_rouge1": 0.9, "retain_perplexity": 2.0, "forget_mrr": 0.1}
    rows = [replace(trial(0, 0.5, 0.9), scores=scores, objective=2.0)]
    goal = Goal.read("retain_perplexity", ["forget_mrr<=0.2"])
    columns = " ".join(written(tmp_path, results_of(rows, goal=goal)).text.split())
    assert "retain perplexity" in columns
    assert "forget MRR" in columns


def test_a_page_says_how_many_answers_it_leaves_out(tmp_path: Path) -> None:
    rows = [said("forget", f"{n}?", f"answer {n}.", 0.5) for n in range(SHOWN + 2)]
    text = written(tmp_path, page_of(tmp_path, trial(0, 0.1, 0.9), answers={0: rows})).text
    assert f"{SHOWN} of {SHOWN + 2} are shown" in text
    assert f"answer {SHOWN - 1}." in text
    assert f"answer {SHOWN}." not in text


def test_a_search_without_texts_says_so_and_has_no_empty_columns(tmp_path: Path) -> None:
    rows = [replace(said("forget", "", "", 0.5), truth="", row=7)]
    private = page_of(tmp_path, trial(0, 0.1, 0.9), name="private", answers={0: rows}, baseline=())
    text = written(tmp_path, private).text
    assert "kept no texts" in text
    assert "row 7" in text
    assert "true answer" not in text
    assert "true answer" in written(tmp_path, page_of(tmp_path, trial(0, 0.1, 0.9))).text


def test_answers_come_worst_first_beside_the_base_models() -> None:
    baseline = [said("retain", f"{n}?", f"v{n}", score) for n, score in enumerate((1.0, 0.5, 0.2))]
    rows = [said("retain", f"{n}?", f"u{n}", score) for n, score in enumerate((0.9, 0.0, 0.6))]
    asked = [said("forget", f"{n}?", f"f{n}", score) for n, score in enumerate((0.1, 0.7, 0.4))]
    answers = answers_beside(baseline, [*asked, *rows])
    found = Findings(trial(0, 0.1, 0.9), {}, {}, None, full=False, answers=answers)
    shown = [(one["unlearned"], one["base_model"]) for one in found.worse or ()]
    assert shown == [("u1", "v1"), ("u0", "v0")]
    shown = [(one["unlearned"], one["base_model"]) for one in found.forgotten]
    assert shown == [("f1", None), ("f2", None), ("f0", None)]


# By forget ROUGE-1 the feasible ones are 7, 5, 4, 3, 2, 0.
RANKED = (
    *(trial(n, 0.6 - n / 10, 0.9) if n != 1 else trial(1, 0.0, 0.3) for n in range(6)),
    failure(6),
    trial(7, 0.05, 0.85),
)
MISSES = (trial(0, 0.1, 0.5), trial(1, 0.2, 0.7), trial(2, 0.1, 0.7), failure(3))


def ranked(folder: Path, *rows: TrialRow, confirmed: int | None) -> SearchResults:
    """Return a search with answers of every trial and, where one is confirmed, its full ones."""
    told_by = {row.number: f"told by {row.number}" for row in rows if row.scores}
    answers = {number: [said("forget", "where?", text, 0.1)] for number, text in told_by.items()}
    note = None
    if confirmed is not None:
        note = {"number": confirmed, "scores": dict(rows[confirmed].scores)}
        full = Folder(folder / "s").answers(confirmed, full=True)
        write_answers(full, [said("forget", "where?", "told in full", 0.1)], ())
    baseline = [said("forget", "where?", "known", 1.0)]
    told = searched(folder / "s", *rows, answers=answers, baseline=baseline)
    notes = {**told.study.notes, "confirmed": note}
    return SearchResults(folder=told.folder, study=replace(told.study, notes=notes))


def answered(page: Path) -> list[int]:
    """Return the trials whose answers a page shows, in its order."""
    found = re.findall(r'class="answers"[^>]*data-number="(\d+)"', page.read_text())
    return [int(number) for number in found]


def test_the_confirmed_best_comes_first_in_full_and_then_the_next_four(tmp_path: Path) -> None:
    """Also beside a search of the same name from another folder, which is not confirmed."""
    (tmp_path / "other").mkdir()
    page = tmp_path / "page.html"
    other = ranked(tmp_path / "other", *RANKED, confirmed=None)
    text = written(tmp_path, ranked(tmp_path, *RANKED, confirmed=5), other).text
    assert answered(page) == [5, 7, 4, 3, 2, 7, 5, 4, 3, 2]
    assert re.findall(r'<article id="([^"]+)"', page.read_text()) == ["search-1", "search-2"]
    assert "told in full" in text
    assert text.count("told by 5") == 1, "of the second alone"
    assert "known" in text
    assert "the best as searched is trial 7" in text


def test_a_search_without_a_feasible_trial_shows_the_nearest_misses(tmp_path: Path) -> None:
    text = written(tmp_path, ranked(tmp_path, *MISSES, confirmed=None)).text
    assert answered(tmp_path / "page.html") == [2, 1, 0]
    assert "No trial is feasible: these are the nearest misses" in text
    assert len(re.findall(r"Trial \d: [^\n]*\(infeasible\)", text)) == 3
    assert "The nearest miss is trial 2" in text
    assert "trial 2, nearest miss" in text


def test_what_is_not_there_is_left_out_and_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    bare = results_of(RANKED, folder=tmp_path / "none")
    text = written(tmp_path, bare).text
    assert answered(tmp_path / "page.html") == []
    assert "No answers of a completed trial are kept." in text
    assert "config.yaml" not in text
    with pytest.raises(InputError, match="no search"):
        write_static_page([], tmp_path / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match=r"folder\.html: the page cannot be written"):
        write_static_page([bare], tmp_path / "folder.html")
