"""A search's results: what is shown of it, and its report in Markdown."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from lunar_tune.display import Summary
from lunar_tune.files import write_atomically
from lunar_tune.metrics.goal import in_words, score_label
from lunar_tune.report.findings import cautions
from lunar_tune.study.rows import FAILED, HEADLINE_SCORES, TrialRow, best_first, nearest_first
from lunar_tune.study.stored_search import StoredSearch

if TYPE_CHECKING:
    from jinja2 import Template

_LISTED = 10  # trials of a report
_SCORES = 4  # of a summary


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
        scores = list(dict.fromkeys((*HEADLINE_SCORES[:2], *self.goal.metrics, *HEADLINE_SCORES)))
        table = [["", *map(score_label, scores[:_SCORES])]]
        for who, known in self.compared.items():
            table.append([who, *(format_value(known.get(one)) for one in scores[:_SCORES])])
        return lines, table

    @property
    def facts(self) -> Mapping[str, Any]:
        """Model, data, method and so on, as they are shown."""
        facts: Mapping[str, Any] = self.study.notes.get("facts", self.study.notes["tags"])
        return facts

    @property
    def origin(self) -> str:
        """What the base model is, and where it came from."""
        names = (str(self.facts[name]) for name in ("model", "origin") if name in self.facts)
        return ", ".join(names)

    @property
    def ending(self) -> str | None:
        """Why the search ended before its time; None if it did not."""
        return self.study.notes.get("ending")

    @property
    def ranked(self) -> list[TrialRow]:
        """The trials that are looked at first, the confirmed best before all others.

        The feasible ones by their objective; where none is, the nearest misses.
        """
        rows = best_first(self.rows) or nearest_first(self.rows, self.goal)
        best = self.best
        if best is None:
            return rows
        return [best, *(row for row in rows if row.number != best.number)]

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
            asked = "held-out questions" if self.held_out else "all questions in full"
            scores[f"trial {best.number}, {asked}"] = self.confirmed
        return scores

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
        missed = dict.fromkeys(one.metric for one in self.goal.missed(first.scores))
        reached = [
            f"{score_label(name)} {first.scores[name]:.3f}"
            if name in first.scores
            else f"{score_label(name)} not measured"
            for name in missed
        ]
        asked = in_words(self.goal.constraints) or "what is asked for"
        return (
            f"{ending}No trial keeps {asked}. The nearest miss is trial "
            f"{first.number} ({', '.join([first.label, *reached])})."
        )


def write_report(
    results: SearchResults, path: Path, pictures: Mapping[str, str] | None = None
) -> None:
    """Write the report.

    Args:
        results: What it says.
        path: The file.
        pictures: What each picture shows, by its place relative to the file's folder.
    """
    best, scores = best_first(results.rows)[:_LISTED], HEADLINE_SCORES[:2]
    names = [*best[0].parameters] if best else []
    trials: list[list[Any]] = [["trial", *names, *map(score_label, scores), "seconds"]]
    for row in best:
        cells = [row.number, *map(row.parameters.get, names), *map(row.scores.get, scores)]
        trials.append([*cells, f"{row.seconds.get('trial', 0.0):.1f}"])
    text = template("report.md.j2").render(
        results=results, short=short_report(results), pictures=pictures or {}, trials=trials
    )
    write_atomically(path, text.encode())


def short_report(results: SearchResults) -> str:
    """Return a search in a few lines: its goal, what came out, what it was told.

    What matters most comes first, since MLflow's note is cut where it is too long.
    """
    first = next(iter(results.ranked), None)
    return template("short.md.j2").render(results=results, cautions=cautions(results, first))


@functools.cache
def template(name: str) -> Template:
    """Return a template of this folder; it formats and, in a page, escapes what it is given."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = {"format_value": format_value, "score_label": score_label, "repr": repr, "table": _table}
    environment.filters |= own
    return environment.get_template(name)


def _table(rows: Sequence[Sequence[Any]]) -> str:
    cells = [[format_value(cell).replace("|", "\\|") for cell in row] for row in rows]
    text: str = tabulate(cells, "firstrow", tablefmt="github", disable_numparse=True)
    return text


def format_value(value: Any) -> str:
    """Return a value as reports and pages show it: four significant digits, a dash for None."""
    if value is None:
        return "–"  # noqa: RUF001 an en dash for what was not measured
    return f"{value:.4g}" if isinstance(value, float) else str(value)
