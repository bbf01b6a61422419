"""One HTML page of one or several searches that opens from a file, without server or network.

Vega, Vega-Lite and vega-embed (0.9 MB) are part of the page, once however many searches it shows.
Texts are escaped by the template; charts are JSON.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError
from lunar_tune.files import write_atomically
from lunar_tune.metrics.evaluate import AnswerRow, paired
from lunar_tune.report.page_tables import (
    estimates_note,
    scores_table,
    searches_table,
    trials_table,
)
from lunar_tune.report.report import Report, verdict

if TYPE_CHECKING:
    from jinja2 import Template

    from lunar_tune.report.results import SearchResults

__all__ = [
    "SHOWN",
    "Compared",
    "PageSearch",
    "TrialAnswers",
    "forgotten",
    "got_worse",
    "write_page",
    "write_static_page",
]

SHOWN = 50
"""Answers of a set that a page shows at most; all are in the trial's own file."""
_ANSWERED = 5  # trials whose answers a page shows: the best, or the nearest misses
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class TrialAnswers:
    """What an unlearned model says."""

    number: int
    """Number of the trial."""
    label: str
    """Its setting in short."""
    rows: Sequence[AnswerRow]
    full: bool = False
    """Whether they come from the full evaluation."""
    feasible: bool = True
    """Whether the trial keeps every bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSearch:
    """What a page shows of one search."""

    name: str
    report: Report
    baseline: Sequence[AnswerRow] = ()
    """The base model's answers; empty where they are not kept."""
    baseline_in_full: Sequence[AnswerRow] = ()
    """Its answers to the questions of the full evaluation; empty where it has no others."""
    answers: Sequence[TrialAnswers] = ()
    """Answers of the best trials, the best first."""
    configuration: str = ""
    """`config.yaml` as it is."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One question with two models' answers."""

    unlearned: AnswerRow
    baseline: AnswerRow | None
    """None where the base model's answer is not kept."""

    @property
    def loss(self) -> float:
        """By how much ROUGE-1 is lower than the base model's; 0 where that is not known."""
        return self.baseline.rouge1 - self.unlearned.rouge1 if self.baseline is not None else 0.0


def write_static_page(results: Sequence[SearchResults], path: Path) -> None:
    """Write one self-contained page of searches, finished or still running, atomically.

    Args:
        results: The searches, in the order in which they are shown.
        path: The file.

    Raises:
        InputError: There is no search to show, or the file cannot be written.
    """
    if not results:
        raise InputError("there is no search to make a page of; name at least one.")
    searches = [_page_search(one) for one in results]
    try:
        write_page(searches, path)
    except OSError as error:
        raise InputError(f"{path}: the page cannot be written ({error}).") from error


def _page_search(results: SearchResults) -> PageSearch:
    def kept(number: int | None = None, *, full: bool = False) -> list[AnswerRow]:
        try:
            return results.answers(number, full=full)
        except InputError:  # their file is not there, as in a search of an older version
            return []

    answers = []
    for row in results.report.ranked[:_ANSWERED]:
        full = kept(row.number, full=True)
        if rows := full or kept(row.number):
            feasible = bool(row.feasible)
            answers.append(TrialAnswers(row.number, row.label, rows, bool(full), feasible))
    config = results.folder.config
    return PageSearch(
        name=results.folder.name,
        report=results.report,
        baseline=kept(),
        baseline_in_full=kept(full=True),
        answers=answers,
        configuration=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def write_page(searches: Sequence[PageSearch], path: Path) -> None:
    """Write a page of searches, atomically.

    Args:
        searches: At least one.
        path: The file, usually `.html`.
    """
    anchored = [(f"search-{place}", one) for place, one in enumerate(searches, start=1)]
    scripts = [_vega(), (_HERE / "page.js").read_text(encoding="utf-8")]
    page = _template().render(
        title=searches[0].report.title if len(searches) == 1 else f"{len(searches)} searches",
        several=searches_table([(anchor, one.name, one.report) for anchor, one in anchored])
        if len(searches) > 1
        else None,
        searches=[_shown(anchor, one) for anchor, one in anchored],
        limit=SHOWN,
        scripts=scripts,
        digests=[_digest(script) for script in scripts],
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
    )
    write_atomically(path, page.encode())


def _shown(anchor: str, one: PageSearch) -> Mapping[str, Any]:
    """Return what the template asks of a search."""
    from lunar_tune.report.charts import CHARTS, charts_of  # loads Altair

    report = one.report
    return {
        "anchor": anchor,
        "name": one.name,
        "report": report,
        "verdict": None if report.best is not None else verdict(report),
        "scores": scores_table(report),
        "trials": trials_table(report),
        "estimates": estimates_note(report),
        "charts": [
            (name, CHARTS[name].caption, chart.to_dict())
            for name, chart in charts_of(report).items()
        ],
        "answers": [_compared(one, answers) for answers in one.answers],
        "has_baseline": bool(one.baseline),
        "has_text": any(
            answer.question or answer.truth or answer.answer
            for answers in one.answers
            for answer in answers.rows
        ),
        "configuration": one.configuration,
    }


def _compared(
    one: PageSearch, answers: TrialAnswers
) -> tuple[TrialAnswers, list[Compared], list[Compared] | None]:
    """Return a trial's answers beside the base model's to the same questions."""
    baseline = (one.baseline_in_full or one.baseline) if answers.full else one.baseline
    return answers, forgotten(answers.rows, baseline), got_worse(answers.rows, baseline)


def forgotten(rows: Sequence[AnswerRow], baseline: Sequence[AnswerRow]) -> list[Compared]:
    """Return the questions to forget, least forgotten first."""
    asked = [row for row in rows if row.set_name == "forget"]
    compared = [Compared(*pair) for pair in paired(asked, baseline)]
    return sorted(compared, key=lambda one: -one.unlearned.rouge1)


def got_worse(rows: Sequence[AnswerRow], baseline: Sequence[AnswerRow]) -> list[Compared] | None:
    """Return the retained questions whose ROUGE-1 fell, the greatest fall first.

    None where the base model's answer to none of them is kept.
    """
    asked = [row for row in rows if row.set_name == "retain"]
    compared = [Compared(*pair) for pair in paired(asked, baseline)]
    if compared and all(one.baseline is None for one in compared):
        return None
    worse = [one for one in compared if one.loss > 0]
    return sorted(worse, key=lambda one: (-one.loss, one.unlearned.rouge1))


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")


@functools.cache
def _vega() -> str:
    """Return the script that draws charts, vega-embed among it; making it takes seconds."""
    import vl_convert

    from lunar_tune.report.marks import VEGA_LITE

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)


def _digest(script: str) -> str:
    """Return what a content security policy calls a script: HTML reads every line end as one."""
    normal = script.replace("\r\n", "\n").replace("\r", "\n")
    return "sha256-" + base64.b64encode(hashlib.sha256(normal.encode()).digest()).decode()
