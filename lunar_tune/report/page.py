"""One HTML page of one or several searches that opens from a file, without server or network.

Vega, Vega-Lite and vega-embed (0.9 MB) are part of the page, once however many searches it shows.
The template formats and escapes what searches and trials say; charts are JSON.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lunar_tune.errors import InputError
from lunar_tune.files import cache_dir, write_atomically
from lunar_tune.report.findings import Findings
from lunar_tune.report.results import SearchResults, template
from lunar_tune.study.rows import COMPLETE, HEADLINE_SCORES, TrialRow, is_number

SHOWN = 50
"""Answers of a set that a page shows at most; all are in the trial's own file."""
_ANSWERED = 5  # trials whose answers a page shows: the best, or the nearest misses
_HERE = Path(__file__).parent


def write_static_page(searches: Sequence[SearchResults], path: Path) -> None:
    """Write one self-contained page of searches, finished or still running, atomically.

    Args:
        searches: In the order in which they are shown.
        path: The file.

    Raises:
        InputError: There is no search to show, or the file cannot be written.
    """
    if not searches:
        raise InputError("there is no search to make a page of; name at least one.")
    scripts = [_vega(), (_HERE / "page.js").read_text(encoding="utf-8")]
    page = template("page.html.j2").render(
        title=searches[0].title if len(searches) == 1 else f"{len(searches)} searches",
        searches=[_content(f"search-{place}", one) for place, one in enumerate(searches, start=1)],
        headline=HEADLINE_SCORES,
        limit=SHOWN,
        scripts=scripts,
        digests=[_digest(script) for script in scripts],
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
    )
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise InputError(f"{path}: the page cannot be written ({error}).") from error


def _content(anchor: str, results: SearchResults) -> dict[str, Any]:
    """Return what the template asks of a search."""
    from lunar_tune.report.charts import CHARTS, charts_of  # loads Altair

    config, rows = results.folder.config, results.rows
    answered = (Findings.of(results, row) for row in results.ranked[:_ANSWERED])
    names = dict.fromkeys(name for row in rows for name in row.parameters)
    return {
        "anchor": anchor,
        "results": results,
        "parameters": {  # with whether all values are numbers
            name: all(is_number(row.parameters.get(name, 0)) for row in rows) for name in names
        },
        "scores": list(dict.fromkeys((*HEADLINE_SCORES, *results.goal.metrics))),
        "kinds": [_kind(row) for row in rows],
        "estimates": _estimates(results),
        "charts": [
            (name, CHARTS[name].caption, chart.to_dict())
            for name, chart in charts_of(results).items()
        ],
        "answers": [one for one in answered if not one.answers.empty],
        "configuration": config.read_text(encoding="utf-8") if config.is_file() else "",
    }


def _kind(row: TrialRow) -> str:
    """Return feasible, infeasible, failed, again (failed and run again) or running."""
    if row.state == COMPLETE:
        return "feasible" if row.feasible else "infeasible"
    return "again" if row.again else row.state


def _estimates(results: SearchResults) -> str:
    """Say what estimates of the retain score were taken from; empty where there is none."""
    known = [row.retain_rows for row in results.rows if row.retain_rows is not None]
    asked = int(results.baseline.get("retain_rows", max(known, default=0)))
    taken = {row.retain_rows == asked for row in results.rows if row.retain_exact is False}
    reasons = {
        f"from a sample of the questions to keep ({asked})": True in taken,
        "from fewer questions to keep where a trial was stopped because it had missed the bound "
        "for certain": False in taken,
    }
    return ", or ".join(reason for reason, is_so in reasons.items() if is_so)


@functools.cache
def _vega() -> str:
    """Return the script that draws charts, vega-embed among it; kept, for it takes seconds."""
    import vl_convert

    from lunar_tune.report.marks import VEGA_LITE

    version = importlib.metadata.version("vl-convert-python")
    kept = cache_dir() / f"vega-lite-{VEGA_LITE}-vl-convert-{version}.js"
    with suppress(OSError, UnicodeDecodeError):
        return kept.read_bytes().decode()
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    with suppress(OSError):
        write_atomically(kept, script.encode())
    return script


def _digest(script: str) -> str:
    """Return what a content security policy calls a script: HTML reads every line end as one."""
    normal = script.replace("\r\n", "\n").replace("\r", "\n")
    return "sha256-" + base64.b64encode(hashlib.sha256(normal.encode()).digest()).decode()
