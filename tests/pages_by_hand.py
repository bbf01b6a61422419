"""Searches made by hand for tests of the page, and the page as it is read."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from invented_searches import TAGS, results_of

from lunar_tune.metrics.evaluate import AnswerRow, deviation_score
from lunar_tune.report.results import SearchResults
from lunar_tune.study.folder import Folder, write_answers
from lunar_tune.study.rows import COMPLETE, FAILED, TrialRow, best_first

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    "<!--<script>",
    "</title><b>bold</b>&amp;",
    '" onmouseover="alert(4)',
)
FLOOR = 0.8


def trial(number: int, forget: float, retain: float, **parameters: object) -> TrialRow:
    """Return a completed trial."""
    kept = retain >= FLOOR
    rate = 1e-4 * (1 + number) ** 1.5
    usual = {"layer": number % 7, "coefficient": 0.5 + number % 5, "learning_rate": rate}
    scores = {"forget_rouge1": forget, "retain_rouge1": retain}
    scores["deviation_score"] = deviation_score(forget, retain)
    return TrialRow(
        number=number,
        state=COMPLETE,
        parameters=parameters or usual,
        scores=scores | ({"factual_rouge1": 0.9} if kept else {}),
        objective=forget,
        feasible=kept,
        retain_rows=84 if kept else 21,
        retain_exact=kept,
        seconds={"trial": 1.0 + number / 10},
    )


def failure(number: int, why: str = "the loss became NaN") -> TrialRow:
    """Return a failed trial."""
    parameters = {"layer": 1, "coefficient": 2.0, "learning_rate": 1e30}
    return TrialRow(number=number, state=FAILED, parameters=parameters, failure=why)


def many(n_trials: int) -> tuple[TrialRow, ...]:
    """Return trials of random scores, every tenth failed."""
    draw = random.Random(3)
    return tuple(
        failure(n) if n % 10 == 9 else trial(n, draw.random(), draw.uniform(0.5, 1.0))
        for n in range(n_trials)
    )


def said(set_name: str, question: str, answer: str, rouge1: float) -> AnswerRow:
    """Return an answer."""
    texts = {"question": question, "truth": "the truth", "answer": answer}
    return AnswerRow(set_name=set_name, edge="A_B", rouge1=rouge1, rouge_l=rouge1, **texts)


def searched(
    path: Path,
    *rows: TrialRow,
    answers: Mapping[int, Sequence[AnswerRow]],
    baseline: Sequence[AnswerRow] = (),
    configuration: str = "search:\n  num_trials: 12\n",
    **more: Any,
) -> SearchResults:
    """Return a search whose best trial is confirmed, in a folder with answers and configuration."""
    folder = Folder(path)
    path.mkdir(parents=True, exist_ok=True)
    for number, told in answers.items():
        write_answers(folder.answers(number), told, ())
    if baseline:
        write_answers(folder.answers(None), baseline, ())
    folder.config.write_text(configuration, encoding="utf-8")
    best = next(iter(best_first(list(rows))), None)
    facts = {"model": "tiny", "data": "mini", "method": "lunar (adamw)"}
    scores = {"forget_rouge1": 0.98, "retain_rouge1": 0.99, "deviation_score": 98.0}
    notes: dict[str, Any] = {"facts": facts, "baseline": scores} | more
    return results_of(rows, confirmed=best.scores if best else None, folder=path, **notes)


def page_of(folder: Path, *rows: TrialRow, name: str = "first", **more: Any) -> SearchResults:
    """Return a search in a folder of its name, with answers of its two best trials."""
    baseline = [
        *(said("forget", f"forget {n}?", "baseline says", 1.0) for n in range(3)),
        *(said("retain", f"keep {n}?", "baseline keeps", 1.0) for n in range(4)),
    ]
    answers = {
        row.number: [
            *(said("forget", f"forget {n}?", f"trial {row.number}", n / 4) for n in range(3)),
            *(said("retain", f"keep {n}?", f"kept {n}", 1 - n / 4) for n in range(4)),
        ]
        for row in best_first(list(rows))[:2]
    }
    return searched(folder / name, *rows, **{"baseline": baseline, "answers": answers} | more)


def hostile(folder: Path) -> SearchResults:
    """Return a search in which every text is HTML that would do harm."""
    row = trial(0, 0.1, 0.9, layer=1, coefficient=2.0, **{"<b>name</b>": HOSTILE[0]})
    answers = [
        replace(said(kind, text, text, 0.5), truth=text)
        for text in HOSTILE
        for kind in ("forget", "retain")
    ]
    return searched(
        folder / HOSTILE[2],  # a folder's name has no slash
        row,
        *(failure(n, why) for n, why in enumerate(HOSTILE, start=1)),
        answers={0: answers},
        baseline=[replace(answer, rouge1=1.0) for answer in answers],
        configuration="\n".join(HOSTILE),
        tags=TAGS | {"model": HOSTILE[4], "data": HOSTILE[1]},
        facts={text: text for text in HOSTILE},
        ending=HOSTILE[2],
    )


class Parsed(HTMLParser):
    """A page's elements, scripts, cells and text, by Python's own parser."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.cells: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

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

    @property
    def running(self) -> list[str]:
        """The scripts that run."""
        return [text for kind, text in self.scripts if kind is None]

    def policy(self) -> str:
        """Return the content security policy."""
        kind = "Content-Security-Policy"
        (found,) = [one["content"] for _, one in self.tags if one.get("http-equiv") == kind]
        return found or ""
