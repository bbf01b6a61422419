"""A short report of a search in Markdown, for a colleague or a repository."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lunar_tune.files import write_atomically
from lunar_tune.metrics.goal import Goal, in_words, score_label
from lunar_tune.study.rows import (
    FAILED,
    HEADLINE_SCORES,
    TrialRow,
    best_first,
    nearest_first,
    score_cells,
)

__all__ = ["LayerCurve", "Report", "short_report", "verdict", "write_report"]

_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCurve:
    """How alike answers are to refusals and to the truth, layer by layer."""

    layers: tuple[int, ...]
    """Ascending."""
    refusal: tuple[float, ...]
    """s1 of each, a mean cosine."""
    truth: tuple[float, ...]
    """s2 of each."""
    base_model: float
    """The score of the base model."""
    best: int
    recommended: tuple[int, ...]

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> LayerCurve:
        """Return the curve of a layer prior in its documented form (`trial.layer_prior`)."""
        scored = document["layers"]
        without = document["base_model"]
        return cls(
            layers=tuple(one["layer"] for one in scored),
            refusal=tuple(one["s1"] for one in scored),
            truth=tuple(one["s2"] for one in scored),
            base_model=without["s1"] - without["s2"],
            best=document["best"],
            recommended=tuple(document["recommended"]),
        )

    @property
    def scores(self) -> list[float]:
        """s1 − s2 of each layer."""
        return [s1 - s2 for s1, s2 in zip(self.refusal, self.truth, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What pictures and report are made of."""

    title: str
    facts: Mapping[str, Any]
    """Model, data, method and so on, as shown."""
    goal: Goal
    baseline: Mapping[str, float]
    """The base model's scores."""
    rows: Sequence[TrialRow]
    best: TrialRow | None
    """The confirmed trial; None where none is feasible."""
    confirmed: Mapping[str, float] | None
    """Its scores in the full evaluation."""
    held_out: bool = False
    """Whether that asks questions that no trial is judged on."""
    baseline_in_full: Mapping[str, float] = field(default_factory=dict)
    """The base model's scores on the same questions; empty where they are not known."""
    ending: str | None = None
    """Why the search ended before its time; None if it did not."""
    log_scale: frozenset[str] = frozenset()
    """The parameters that were searched on a logarithmic scale."""
    listed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The values of those that were chosen from a list."""
    importance: Callable[[], Mapping[str, Mapping[str, float]]] = dict
    """Gives, of scores by name, the share of their variance that each parameter explains by itself;
    called by the pictures and reports that show it alone, since it may take seconds."""
    layers: LayerCurve | None = None
    """The scored layers that the search began with."""

    @property
    def asked_retain_rows(self) -> int | None:
        """Questions to keep that a trial is asked if it is not stopped; None if not known."""
        asked = self.baseline.get("retain_rows")
        known = [row.retain_rows for row in self.rows if row.retain_rows is not None]
        return int(asked) if asked is not None else max(known, default=None)

    def was_stopped(self, row: TrialRow) -> bool:
        """Say whether a completed trial was asked only a part of the questions of its search.

        That is so where it had missed the bound for certain. A search that asks a sample asks every
        trial a part of the retain set.
        """
        asked = self.asked_retain_rows
        return row.retain_rows is not None and asked is not None and row.retain_rows < asked

    @property
    def ranked(self) -> list[TrialRow]:
        """The trials that are looked at first, the confirmed best before all others.

        The feasible ones by their objective; where none is, the nearest misses.
        """
        rows = best_first(list(self.rows)) or nearest_first(self.rows, self.goal)
        best = self.best
        if best is None:
            return rows
        return [best, *(row for row in rows if row.number != best.number)]

    @property
    def compared(self) -> dict[str, Mapping[str, float]]:
        """The scores that stand beside each other, by whose they are; empty where not known."""
        scores = {"base model": self.baseline}
        if self.best is None and self.ranked:
            first = self.ranked[0]
            what = "as searched" if first.feasible else "nearest miss"
            scores[f"trial {first.number}, {what}"] = first.scores
        if self.best is not None and self.confirmed is not None:
            trial = f"trial {self.best.number}"
            scores[f"{trial}, as searched"] = self.best.scores
            if self.held_out:
                scores["base model, held-out questions"] = self.baseline_in_full
            asked = "held-out questions" if self.held_out else "all questions in full"
            scores[f"{trial}, {asked}"] = self.confirmed
        return scores


def write_report(report: Report, path: Path, pictures: Mapping[str, str] | None = None) -> None:
    """Write the report as Markdown.

    Args:
        report: What it says.
        path: The file.
        pictures: What each picture shows, by its place relative to the file's folder.
    """
    parts = [
        f"# {report.title}",
        _table(("what", "value"), [(key, str(value)) for key, value in report.facts.items()]),
        "## Result",
        _result(report),
        *(f"![{caption}]({place})" for place, caption in (pictures or {}).items()),
        *([_importance(shares)] if (shares := report.importance()) else []),
        f"## The best of {sum(not row.again for row in report.rows)} trials",
        _trials(best_first(list(report.rows))[:_SHOWN]) or "No trial is feasible.",
    ]
    failed = [row for row in report.rows if row.state == FAILED and row.counts]
    if failed:
        parts += ["## Failed trials", "\n".join(f"- {r.number}: {r.failure}" for r in failed)]
    write_atomically(path, ("\n\n".join(parts) + "\n").encode())


def verdict(report: Report) -> str:
    """Say why there is no confirmed best setting, also of a search that still runs."""
    ending = f"{report.ending} " if report.ending else ""
    candidates = best_first(list(report.rows))
    ended = [row for row in report.rows if row.counts]
    failures = Counter(row.failure for row in ended if row.state == FAILED)
    if candidates:
        first = candidates[0]
        return (
            f"{ending}No setting is confirmed by a full evaluation; the best as searched is trial "
            f"{first.number} ({first.label})."
        )
    if not ended:
        return f"{ending}No trial has ended." if ending else "No trial has ended yet."
    if failures.total() == len(ended):
        return f"{ending}Every trial failed, most of them with: {failures.most_common(1)[0][0]}"
    said = f"{ending}No trial keeps {in_words(report.goal.constraints) or 'what is asked for'}."
    return f"{said} The nearest miss is {_nearest_miss(report)}."


def _nearest_miss(report: Report) -> str:
    """Return the trial that misses least and what it reaches of the bounds that it misses."""
    first = report.ranked[0]
    missed = [one.metric for one in report.goal.missed(first.scores)]
    reached = [
        f"{score_label(name)} {first.scores[name]:.3f}"
        if name in first.scores
        else f"{score_label(name)} not measured"
        for name in dict.fromkeys(missed)
    ]
    return f"trial {first.number} ({', '.join([first.label, *reached])})"


def _result(report: Report) -> str:
    header = ("", "forget ROUGE-1", "retain ROUGE-1", "factual ROUGE-1", "deviation score")
    body = [
        (who, *(_number(scores.get(name)) for name in HEADLINE_SCORES))
        for who, scores in report.compared.items()
    ]
    best = report.best
    said = verdict(report) if best is None else f"Best: trial {best.number} ({best.label})."
    return f"{_table(header, body)}\n\n{said}"


def _importance(importance: Mapping[str, Mapping[str, float]]) -> str:
    """Say what decides each score, in a line."""
    parts = [
        f"{score_label(metric)}: "
        + ", ".join(f"{name.replace('_', ' ')} {share:.2f}" for name, share in shares.items())
        for metric, shares in importance.items()
    ]
    return f"Share of the variance that a parameter explains by itself: {'; '.join(parts)}."


def _trials(rows: Sequence[TrialRow]) -> str:
    if not rows:
        return ""
    parameters = list(rows[0].parameters)
    header = ("trial", *parameters, "forget ROUGE-1", "retain ROUGE-1", "seconds")
    body = [
        (
            str(row.number),
            *(_number(row.parameters[name]) for name in parameters),
            _number(row.scores["forget_rouge1"]),
            _number(row.scores["retain_rouge1"]),
            f"{row.seconds.get('trial', 0.0):.1f}",
        )
        for row in rows
    ]
    return _table(header, body)


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if value is None:
        return "–"  # noqa: RUF001 an en dash for what was not measured
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_report(report: Report) -> str:
    """Return a search in a few lines of Markdown: its goal, what came out, what it was told."""
    if report.best is not None:
        setting = ", ".join(f"{name} `{v!r}`" for name, v in report.best.parameters.items())
        outcome = f"**Best feasible setting**: {setting} (trial {report.best.number})."
    else:
        outcome = verdict(report)
    lines = [
        f"{str(report.goal)[:1].upper()}{str(report.goal)[1:]}.",
        "",
        outcome,
        "",
        "| | forget ROUGE-1 | retain ROUGE-1 | factual ROUGE-1 | deviation score |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join([who, *score_cells(s)])} |" for who, s in report.compared.items()),
        "",
        *(f"- {label}: {text}" for label, text in report.facts.items()),
    ]
    return "\n".join(lines) + "\n"
