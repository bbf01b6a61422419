"""One HTML page of one or several searches that opens from a file, without server or network.

plotly.js (about 4.8 MB) and DataTables (0.9 MB as base64, from itables) are part of the page, once
however many searches it shows. Texts are escaped by the template; data of pictures are JSON.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lunar_tune.files import write_atomically
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.report.interactive.plots import interactive_pictures
from lunar_tune.report.page_answers import (
    SHOWN,
    Compared,
    TrialAnswers,
    forgotten,
    got_worse,
)
from lunar_tune.report.page_tables import (
    estimates_note,
    scores_table,
    searches_table,
    trials_table,
)
from lunar_tune.report.report import Report, verdict

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["PageSearch", "write_page"]

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSearch:
    """What a page shows of one search."""

    name: str
    report: Report
    vanilla: Sequence[AnswerRow] = ()
    """The base model's answers; empty where they are not kept."""
    vanilla_in_full: Sequence[AnswerRow] = ()
    """Its answers to the questions of the full evaluation; empty where it has no others."""
    answers: Sequence[TrialAnswers] = ()
    """Answers of the best trials, the best first."""
    configuration: str = ""
    """`config.yaml` as it is."""


def write_page(searches: Sequence[PageSearch], path: Path) -> None:
    """Write a page of searches, atomically.

    Args:
        searches: At least one.
        path: The file, usually `.html`.
    """
    anchors = [f"search-{place}" for place in range(1, len(searches) + 1)]
    anchored = list(zip(anchors, searches, strict=True))
    scripts = {"plotly": _plotly(), "page": _text("page.js")}
    page = _template().render(
        title=searches[0].report.title if len(searches) == 1 else f"{len(searches)} searches",
        several=searches_table([(anchor, one.name, one.report) for anchor, one in anchored])
        if len(searches) > 1
        else None,
        searches=[_shown(anchor, one) for anchor, one in anchored],
        limit=SHOWN,
        scripts=scripts,
        digests=[_digest(script) for script in scripts.values()],
        styles=[_datatables(".css").decode(), _text("page.css")],
        datatables=base64.b64encode(_datatables(".js")).decode(),
    )
    write_atomically(path, page.encode())


def _shown(anchor: str, one: PageSearch) -> Mapping[str, Any]:
    """Return what the template asks of a search."""
    report = one.report
    pictures = interactive_pictures(report)
    return {
        "anchor": anchor,
        "name": one.name,
        "report": report,
        "verdict": None if report.best is not None else verdict(report),
        "scores": scores_table(report),
        "trials": trials_table(report),
        "estimates": estimates_note(report),
        "pictures": [(picture, _json(picture.figure)) for picture in pictures],
        "answers": [_compared(one, answers) for answers in one.answers],
        "has_vanilla": bool(one.vanilla),
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
    vanilla = (one.vanilla_in_full or one.vanilla) if answers.full else one.vanilla
    return answers, forgotten(answers.rows, vanilla), got_worse(answers.rows, vanilla)


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


def _json(figure: Any) -> str:
    """Return a figure for a script element: `<`, `>` and `/` stand as escapes."""
    from plotly.io import to_json

    text: str = to_json(figure)
    return text


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    source: str = get_plotlyjs()
    return source


def _datatables(suffix: str) -> bytes:
    """Return itables' bundle of DataTables, its script or its style sheet."""
    from itables import options

    return Path(options.dt_bundle).with_suffix(suffix).read_bytes()


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """Return what a content security policy calls a script: HTML reads every line end as one."""
    normal = script.replace("\r\n", "\n").replace("\r", "\n")
    return "sha256-" + base64.b64encode(hashlib.sha256(normal.encode()).digest()).decode()
