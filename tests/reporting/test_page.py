"""The page of searches: complete in itself, literal in what it shows, true to the rows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from invented_searches import results_of
from pages_by_hand import HOSTILE, failure, hostile, many, page_of, said, trial

from lunar_tune.metrics.goal import Goal
from lunar_tune.report.page import SHOWN, forgotten, got_worse, write_static_page
from lunar_tune.report.results import SearchResults
from lunar_tune.study.rows import COMPLETE, TrialRow

LOADING = {"src", "href", "data", "poster", "srcset", "action", "background"}


class Parsed(HTMLParser):
    """A page's elements, scripts, cells and text, by Python's own parser."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.cells: list[tuple[str, str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        if tag == "td":
            self.cells.append((dict(attrs).get("data-order") or "", ""))

    def handle_data(self, data: str) -> None:
        tag = self.tags[-1][0] if self.tags else ""
        if self.cdata_elem == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = kind, text + data
        elif self.cdata_elem is None:
            self.text += data
            if tag in {"td", "a"} and data.strip():
                order, text = self.cells[-1]
                self.cells[-1] = order, text + data

    def policy(self) -> str:
        """Return the content security policy."""
        (found,) = [
            attributes["content"]
            for tag, attributes in self.tags
            if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
        ]
        return found or ""


def written(folder: Path, *searches: SearchResults) -> Parsed:
    write_static_page(searches, folder / "page.html")
    return Parsed(folder / "page.html")


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    second = page_of(tmp_path, *many(5), name="second")
    parsed = written(tmp_path, page_of(tmp_path, *many(12)), second)
    places = [
        value
        for _, attributes in parsed.tags
        for name, value in attributes.items()
        if name in LOADING
    ]
    assert all(value and value.startswith(("data:", "#")) for value in places), places
    assert "#search-2" in places
    assert parsed.policy().startswith("default-src 'none';")


def test_the_policy_names_exactly_the_scripts_that_stand_in_the_page(tmp_path: Path) -> None:
    parsed = written(tmp_path, page_of(tmp_path, *many(4)))
    running = [text for kind, text in parsed.scripts if kind is None]
    digests = {
        "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in running
    }
    assert set(re.findall(r"'(sha256-[^']+)'", parsed.policy())) == digests
    assert "unsafe-inline" not in parsed.policy().split("script-src")[1].split(";")[0]
    assert "unsafe-eval" not in parsed.policy()


def test_libraries_are_in_the_page_once_however_many_searches(tmp_path: Path) -> None:
    one = written(tmp_path, page_of(tmp_path, *many(4)))
    size = (tmp_path / "page.html").stat().st_size
    three = written(tmp_path, *(page_of(tmp_path, *many(4), name=name) for name in "abc"))
    assert size < 1_500_000
    libraries = [
        [text for kind, text in parsed.scripts if kind != "application/json"]
        for parsed in (one, three)
    ]
    assert libraries[0] == libraries[1]
    assert (tmp_path / "page.html").stat().st_size < 1.2 * size


def test_what_others_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    failures = [failure(n) for n in range(1, 7)]
    tame = written(tmp_path, page_of(tmp_path, trial(0, 0.1, 0.9), *failures))
    parsed = written(tmp_path, hostile(tmp_path))
    for text in HOSTILE:
        # Question, truth, both answers, a fact's two sides, a failure, the settings at least.
        assert parsed.text.count(text) >= 8, text
    assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in tame.tags}
    running = [text for kind, text in parsed.scripts if kind is None]
    assert running == [text for kind, text in tame.scripts if kind is None]
    for kind, text in parsed.scripts:
        assert kind is None or "<" not in text
    handlers = [name for _, attributes in parsed.tags for name in attributes if name[:2] == "on"]
    assert handlers == []


def test_a_row_shows_and_sorts_by_the_trials_own_numbers(tmp_path: Path) -> None:
    rows = many(20)
    write_static_page([page_of(tmp_path, *rows)], tmp_path / "page.html")
    parsed = Parsed(tmp_path / "page.html")
    width = 12
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
        assert shown == [
            *row.parameters.values(),
            *(
                row.scores.get(name)
                for name in (
                    "forget_rouge1",
                    "retain_rouge1",
                    "factual_rouge1",
                    "deviation_score",
                )
            ),
        ]
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


@pytest.mark.parametrize(
    ("rows", "said", "unsaid"),
    [
        ((trial(0, 0.1, 0.9),), "A click on", "≈"),
        ((trial(0, 0.1, 0.9), trial(1, 0.1, 0.5)), STOPPED, "a sample"),
        ((SAMPLED[0], SAMPLED[2]), SAMPLE, "stopped"),
        (SAMPLED, f"{SAMPLE}, or from fewer", "≈ from fewer"),
    ],
    ids=["all asked", "stopped", "sample", "both"],
)
def test_an_estimate_from_a_sample_is_not_called_a_stop(
    tmp_path: Path, rows: tuple[TrialRow, ...], said: str, unsaid: str
) -> None:
    text = written(tmp_path, page_of(tmp_path, *rows)).text
    assert said in text
    assert unsaid not in text


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((), "No trial has ended yet."),
        ((failure(0),), "Every trial failed, most of them with: the loss became NaN"),
        ((trial(0, 0.1, 0.3),), "No trial keeps retain ROUGE-1 of at least 0.8."),
        ((trial(0, 0.1, 0.9),), "confirmed on all questions"),
    ],
    ids=["none", "failed", "infeasible", "found"],
)
def test_a_page_says_what_came_out_whatever_it_was(
    tmp_path: Path, rows: tuple[TrialRow, ...], expected: str
) -> None:
    parsed = written(tmp_path, page_of(tmp_path, *rows))
    assert expected in parsed.text
    charts = [json.loads(text) for kind, text in parsed.scripts if kind == "application/json"]
    assert len(charts) == (2 if any(row.state == COMPLETE for row in rows) else 0)
    assert all(chart["concat"] for chart in charts)


def test_other_goals_have_their_columns(tmp_path: Path) -> None:
    goal = Goal.read("retain_perplexity", ["forget_mrr<=0.2"])
    rows = [
        TrialRow(
            number=n,
            state=COMPLETE,
            parameters={"learning_rate": 10.0**-n},
            scores={"forget_rouge1": 0.5, "retain_rouge1": 0.9}
            | {"retain_perplexity": 10.0**n, "forget_mrr": 0.1 * n},
            objective=10.0**n,
            feasible=0.1 * n <= 0.2,
        )
        for n in range(4)
    ]
    parsed = written(tmp_path, results_of(rows, goal=goal))
    columns = " ".join(parsed.text.split())
    assert "retain perplexity" in columns
    assert "forget MRR" in columns


def test_the_result_and_its_answers_come_first(tmp_path: Path) -> None:
    written(tmp_path, page_of(tmp_path, *many(4)))
    titles = re.findall(r"<h3>([^<]*)</h3>", (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert titles == ["Result", "What was searched", "Answers", "Charts", "Trials", "Settings"]


def test_a_page_says_how_many_answers_it_leaves_out(tmp_path: Path) -> None:
    rows = [said("forget", f"{n}?", f"answer {n}", 0.5) for n in range(SHOWN + 2)]
    text = written(tmp_path, page_of(tmp_path, trial(0, 0.1, 0.9), answers={0: rows})).text
    assert f"{SHOWN} of {SHOWN + 2} are shown" in text
    assert f"answer {SHOWN - 1}" in text
    assert f"answer {SHOWN}" not in text


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
    worse = got_worse(rows, baseline)
    assert [(now.answer, before and before.answer) for now, before in worse or ()] == [
        ("u1", "v1"),
        ("u0", "v0"),
    ]
    asked = [said("forget", f"{n}?", f"f{n}", score) for n, score in enumerate((0.1, 0.7, 0.4))]
    compared = forgotten([*asked, *rows], baseline)
    assert [now.answer for now, _ in compared] == ["f1", "f2", "f0"]
    assert [before for _, before in compared] == [None] * 3
