"""A search's results: what is shown of it, its report in Markdown, and its page.

A page opens from a file, without server or network: Vega, Vega-Lite and vega-embed (0.9 MB) are
part of it, once however many searches it shows.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from tabulate import tabulate

from lunar_tune.display import Summary, markdown
from lunar_tune.errors import InputError
from lunar_tune.files import cache_dir, write_atomically
from lunar_tune.metrics.goal import FLOORED, in_words, score_label
from lunar_tune.metrics.means import errors_of
from lunar_tune.report.findings import Findings, cautions
from lunar_tune.study.rows import (
    FAILED,
    HEADLINE_SCORES,
    VERDICT_SCORES,
    alike,
    best_first,
    is_number,
    shown_score,
)
from lunar_tune.study.stored_search import StoredSearch

if TYPE_CHECKING:
    from jinja2 import Template

SHOWN = 50  # answers of a set that a page shows at most; all are in the trial's own file
_ANSWERED = 5  # trials whose answers a page shows: the best, or the nearest misses
_LISTED = 10  # trials of a report
_SCORES = 4  # of a summary
_HERE = Path(__file__).parent


class SearchResults(Summary, StoredSearch):
    """A search as it stands on disk, with what is shown of it."""

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """Return what came out so far, and the scores beside each other; see `Summary`."""
        ended = sum(row.counts for row in self.rows)
        feasible = len(best_first(self.rows))
        lines = [
            f"search {self.folder.name}: {ended} trials, {feasible} feasible",
            self.title,
            str(self.goal),
            self.outcome,
            f"in {self.folder.path}",
        ]
        scores = self.known(*HEADLINE_SCORES[:2], *self.goal.metrics, *HEADLINE_SCORES)
        table = [["", *map(score_label, scores[:_SCORES])]]
        for who, known in self.compared.items():
            table.append([who, *(format_score(known, one) for one in scores[:_SCORES])])
        return lines, table

    @property
    def facts(self) -> Mapping[str, Any]:
        """Model, data, method and so on, as they are shown."""
        return dict(self.study.notes.get("facts", self.study.notes["tags"]))

    @property
    def ending(self) -> str | None:
        """Why the search ended before its time; None if it did not."""
        return self.study.notes.get("ending")

    @property
    def outlook(self) -> str | None:
        """What more trials would bring, in a sentence; None where that was not estimated."""
        told = self.study.notes.get("outlook")
        if told is None or self.ending is not None:
            return None
        chance = _in_percent(told["chance"])
        better = f"better by more than {told['gain']:.2g}"
        if not any(row.feasible for row in self.rows):
            asked = in_words(self.goal.constraints)
            return f"a setting that keeps {asked} exists with a probability of {chance}"
        if not told["settled"]:
            return f"a setting that is {better} exists with a probability of {chance}"
        text = f"no setting of this space is likely to be {better} (probability {chance})"
        if self.goal.then is self.goal.objective or told["second_chance"] is None:
            return text
        chance, then = _in_percent(told["second_chance"]), score_label(self.goal.then.name)
        if told["enough"]:
            return f"{text}, nor one that is as good to have a better {then} (probability {chance})"
        return f"{text}; one that is as good and has a better {then}: probability {chance}"

    @property
    def kept_again(self) -> str | None:
        """How likely the best setting keeps the bounds on new questions; which is likelier to."""
        note = self.study.notes.get("new_questions") or {}
        if not note:
            return None
        asked = in_words(self.goal.constraints)
        likely = _in_percent(note["kept_again"])
        text = f"on as many new questions of the same kind it keeps {asked}: {likely} likely"
        if (gap := note["gap"]) is not None:
            unseen, seen = gap["unseen"], gap["unseen"] + gap["mean"]
            text += f" ({score_label(FLOORED)} on {gap['rows']} of the questions is {unseen:.3f} "
            text += f"where the fit did not see them, {seen:.3f} where it did)"
        if note["surer"] is None:
            return text
        number, chance = note["surer"]
        objective = self.goal.objective.name
        reached = f"{score_label(objective)} {format_score(self.rows[number].scores, objective)}"
        return f"{text}; trial {number} ({reached}): {_in_percent(chance)}"

    @property
    def equals(self) -> str | None:
        """Which trials the objective does not tell apart, in a sentence; None where it does."""
        numbers = [row.number for row in alike(self.rows)]
        if self.best is None or self.best.number not in numbers or len(numbers) == 1:
            return None
        listed = ", ".join(map(str, numbers[:_LISTED])) + (", …" if numbers[_LISTED:] else "")
        then = score_label(self.goal.then.name)
        text = f"{score_label(self.goal.objective.name)} does not tell trials {listed} apart"
        if numbers[0] == self.best.number and self.goal.then is not self.goal.objective:
            text += f"; the first has the best {then}"
        return text

    @property
    def compared(self) -> dict[str, Mapping[str, float]]:
        """The scores that stand beside each other, by whose they are; empty where not known."""
        best, scores = self.best, {"base model": self.baseline}
        if best is None and self.ranked:
            first = self.ranked[0]
            what = "as searched" if first.feasible else "nearest miss"
            scores[f"trial {first.number}, {what}"] = first.scores
        if best is not None and self.confirmed is not None:
            scores[f"trial {best.number}, as searched"] = best.scores
            if self.held_out:
                scores["base model, held-out questions"] = self.baseline_in_full
            asked = "held-out questions" if self.held_out else "confirmation"
            scores[f"trial {best.number}, {asked}"] = self.confirmed
        return scores

    def known(self, *names: str) -> list[str]:
        """Return those of the scores, each once, that are known of what is compared."""
        compared = self.compared.values()
        return [one for one in dict.fromkeys(names) if any(one in scores for scores in compared)]

    @property
    def outcome(self) -> str:
        """The confirmed best setting, or why there is none."""
        if self.best is None:
            return self.verdict
        setting = "  ".join(f"{k} {format_value(v)}" for k, v in self.best.parameters.items())
        return f"best feasible setting: {setting} (trial {self.best.number})"

    @property
    def verdict(self) -> str:
        """Why there is no confirmed best setting, also of a search that still runs."""
        ending = f"{self.ending} " if self.ending else ""
        ended = [row for row in self.rows if row.counts]
        failures = Counter(row.failure for row in ended if row.state == FAILED)
        if not ended:
            return f"{ending}No trial has ended." if ending else "No trial has ended yet."
        if failures.total() == len(ended):
            return f"{ending}Every trial failed, most of them with: {failures.most_common(1)[0][0]}"
        first = self.ranked[0]
        if first.feasible:
            return (
                f"{ending}No setting is confirmed by a full evaluation; the best as searched is "
                f"trial {first.number} ({first.label})."
            )
        known = {name: f"{score:.3f}" for name, score in first.scores.items()}
        missed = dict.fromkeys(one.metric for one in self.goal.missed(first.scores))
        reached = (f"{score_label(name)} {known.get(name, 'not measured')}" for name in missed)
        asked = in_words(self.goal.constraints) or "what is asked for"
        return (
            f"{ending}No trial keeps {asked}. The nearest miss is trial "
            f"{first.number} ({', '.join([first.label, *reached])})."
        )


def write_report(results: SearchResults, path: Path, pictures: Mapping[str, str]) -> None:
    """Write the report, with pictures' captions by where they are relative to the file's folder."""
    best, scores = best_first(results.rows)[:_LISTED], HEADLINE_SCORES[:2]
    names = [*best[0].parameters] if best else []
    trials: list[list[Any]] = [["trial", *names, *map(score_label, scores), "seconds"]]
    for row in best:
        cells = [row.number, *map(row.parameters.get, names)]
        cells += [format_score(row.scores, name) for name in scores]
        trials.append([*cells, f"{row.seconds.get('trial', 0.0):.1f}"])
    text = template("report.md.j2").render(
        results=results, short=short_report(results), pictures=pictures, trials=trials
    )
    write_atomically(path, text.encode())


def short_report(results: SearchResults) -> Markup:
    """Return a search in a few lines: its goal, what came out, what it was told.

    What matters most comes first, since MLflow's note is cut where it is too long.
    """
    endings = [Findings.of(results, row).endings for row in results.ranked[:1]]
    told = {"cautions": cautions(results), "endings": "".join(endings)}
    text = template("short.md.j2").render(results=results, **told)
    return Markup(text)  # noqa: S704  # is Markdown


def write_static_page(searches: Sequence[SearchResults], path: Path) -> None:
    """Write one self-contained page of searches, finished or running, or raise an InputError."""
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
    from lunar_tune.report.charts import charts_of  # loads Altair

    config, rows = results.folder.config, results.rows
    answered = (Findings.of(results, row) for row in results.ranked[:_ANSWERED])
    names = dict.fromkeys(name for row in rows for name in row.parameters)
    return {
        "anchor": anchor,
        "results": results,
        "parameters": {  # with whether all values are numbers
            name: all(is_number(row.parameters.get(name, 0)) for row in rows) for name in names
        },
        "scores": results.known(*HEADLINE_SCORES, *results.goal.metrics, *VERDICT_SCORES),
        "charts": list(charts_of(results)),
        "answers": [one for one in answered if not one.answers.empty],
        "configuration": config.read_text(encoding="utf-8") if config.is_file() else "",
    }


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


@functools.cache
def template(name: str) -> Template:
    """Return a template of this folder; it formats and escapes what it is given."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=name.endswith(".html.j2"),
        finalize=markdown if name.endswith(".md.j2") else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = {"format_value": format_value, "format_score": format_score, "table": _table}
    own |= {"score_label": score_label, "repr": repr}
    environment.filters |= own
    return environment.get_template(name)


def _in_percent(chance: float) -> str:
    if chance < 0.01:
        return "less than 1%"
    return "more than 99%" if chance > 0.99 else f"{chance:.0%}"


def _table(rows: Sequence[Sequence[Any]]) -> Markup:
    cells = [[markdown(format_value(cell)).replace("|", "\\|") for cell in row] for row in rows]
    table = tabulate(cells, "firstrow", tablefmt="github", disable_numparse=True)
    return Markup(table)  # noqa: S704  # is escaped


def format_score(scores: Mapping[str, float], name: str) -> str:
    """Return one of some scores as reports and pages show it, with its standard error if known."""
    error = errors_of(scores).get(name)
    return format_value(scores.get(name)) if error is None else shown_score(scores[name], error)


def format_value(value: Any) -> str:
    """Return a value as reports and pages show it: four significant digits, a dash for None."""
    if value is None:
        return "–"  # noqa: RUF001 an en dash for what was not measured
    return f"{value:.4g}" if isinstance(value, float) else str(value)
