"""What a search found beside its scores: its answers, what they lost, and what to be careful of.

The words are those of the summary on the screen, of `report.md` and of MLflow's note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from optuna.distributions import FloatDistribution, IntDistribution

from lunar_tune.errors import InputError
from lunar_tune.metrics.evaluate import AnswerRow, mean, paired
from lunar_tune.metrics.goal import Goal, score_label
from lunar_tune.metrics.names import METRICS
from lunar_tune.study.rows import TrialRow

if TYPE_CHECKING:
    from lunar_tune.report.results import SearchResults

__all__ = ["LEAST_TO_FORGET", "Findings", "Pair", "cautions"]

Pair = tuple[AnswerRow, AnswerRow | None]
"""An answer of the unlearned model and the base model's to the same question."""

# A base model that says fewer of the words than this does not know the data.
LEAST_TO_FORGET = 0.3
# What a score may lose unbounded: as much as the usual bound of 0.8 leaves a model that knows all.
FALL = 0.2
# The share of a range that is taken for its edge.
EDGE = 0.02
# The share of the base model's MRR above which an answer counts as ranked high: `tiny`, which knows
# its answers, has 1.00 on them and 0.59 on answers to the same question about somebody else.
HIGH_RANK = 0.8
# Answers that repeat themselves at the end: any few characters, five times and more.
_REPEATS = re.compile(r"(.{1,40}?)\1{4,}.{0,40}\Z", re.DOTALL)


@dataclass(frozen=True)
class Findings:
    """The answers of the setting that a search puts first, as they were evaluated last."""

    results: SearchResults
    row: TrialRow

    @classmethod
    def of(cls, results: SearchResults) -> Findings | None:
        """Return those of the best setting, or of the nearest miss; None where no trial ended."""
        row = next(iter(results.ranked), None)
        return cls(results, row) if row is not None else None

    @property
    def confirmed(self) -> bool:
        """Whether the setting is confirmed, so that there are answers of a full evaluation."""
        return self.results.best is not None

    @property
    def scores(self) -> Mapping[str, float]:
        """The setting's scores."""
        return self.results.confirmed or self.row.scores

    @property
    def baseline(self) -> Mapping[str, float]:
        """The base model's scores on the same questions."""
        return self.results.baseline_in_full if self.confirmed else self.results.baseline

    @cached_property
    def pairs(self) -> Sequence[Pair]:
        """All answers; none where they are not there."""
        with suppress(InputError):
            after = self.results.answers(self.row.number, full=self.confirmed)
            return paired(after, self.results.answers(full=self.confirmed))
        return []

    def of_set(self, name: str) -> list[Pair]:
        """Return the answers to one set."""
        return [pair for pair in self.pairs if pair[0].set_name == name]

    def examples(self, name: str, count: int = 3) -> list[Pair]:
        """Return a few answers, the same ones always: first those that lost most, where some did.

        Of the forget set, where losing is wanted, and after those, the edges take turns.
        """
        turns: dict[str, int] = {}
        in_turn = []
        for pair in self.of_set(name):
            turns[pair[0].edge] = turn = turns.get(pair[0].edge, -1) + 1
            in_turn.append((0.0 if name == "forget" else min(0.0, -_loss(pair)), turn, pair))
        return [pair for *_, pair in sorted(in_turn, key=lambda one: one[:2])[:count]]

    @property
    def endings(self) -> str:
        """How the answers to the forget set end; empty where that is not known."""
        rows = [row for row, _ in self.of_set("forget")]
        if not rows or any(row.ended is None and row.rouge_l < 1 for row in rows):
            return ""
        note = self.results.study.notes.get("confirmed") or {}
        budget = note.get("max_new_tokens") if self.confirmed else self.row.max_new_tokens
        by_themselves, cut = (sum(row.ended is how for row in rows) for how in (True, False))
        text = (
            f"{by_themselves} of {len(rows)} forget answers end by themselves, {cut} were cut at "
            f"{budget} tokens"
        )
        left = len(rows) - by_themselves - cut
        return text + (f", {left} were left once they had said the true answer" if left else "")

    @property
    def losses(self) -> str:
        """How many answers beside the forget set lost words, and where most; empty if not known."""
        parts = []
        for name in ("retain", "factual"):
            pairs = [pair for pair in self.of_set(name) if pair[1] is not None]
            if not pairs:
                continue
            lost = sum(_loss(pair) > 0 for pair in pairs)
            text = f"{lost} of {len(pairs)} {name} answers lost words"
            if lost and name == "retain":
                text += " (the worst below)"
            by_edge: dict[str, list[Pair]] = {}
            for pair in pairs:
                by_edge.setdefault(pair[0].edge, []).append(pair)
            edge, worst = max(by_edge.items(), key=lambda item: mean([*map(_loss, item[1])]))
            if lost and len(by_edge) > 1:
                after = mean([row.rouge1 for row, _ in worst])
                before = after + mean([*map(_loss, worst)])
                text += f", most on {edge} (ROUGE-1 {before:.3f}, now {after:.3f})"
            parts.append(text)
        return "; ".join(parts)


def _loss(pair: Pair) -> float:
    row, before = pair
    return before.rouge1 - row.rouge1 if before is not None else 0.0


def cautions(results: SearchResults) -> list[str]:
    """Return what somebody who takes a search's best setting should know first."""
    found, forget = [], results.baseline.get("forget_rouge1", 1.0)
    if forget < LEAST_TO_FORGET:
        found.append(
            f"the base model never knew the forget set (ROUGE-1 {forget:.3f}): a low forget score "
            "says nothing about unlearning here. Fine-tune the model on the data first."
        )
    findings = Findings.of(results)
    if findings is not None and findings.row.feasible:
        for search in (_fallen, _at_an_edge, _still_likely, _rambling):
            found += search(findings)
    return found


def _fallen(findings: Findings) -> Iterator[str]:
    """Say which scores that nothing bounds fell a lot; ROUGE-L falls with ROUGE-1."""
    goal, before, after = findings.results.goal, findings.baseline, findings.scores
    for name in sorted(before.keys() & after.keys() & set(METRICS) - set(goal.metrics)):
        metric = METRICS[name]
        kept = not metric.lower_is_better and (metric.low, metric.high) == (0, 1)
        if kept and metric.quantity != "rougeL" and before[name] - after[name] > FALL:
            least = f"{name}>={max(0.0, before[name] - FALL):.2g}"
            yield (
                f"{score_label(name)} fell from {before[name]:.3f} to {after[name]:.3f}, and "
                f"nothing bounds it. Bound it: {_bounds(goal, least)}"
            )


def _bounds(goal: Goal, another: str) -> str:
    """Return the options for a goal's bounds and another one; given once, they replace all."""
    return " ".join(f"--constrain '{one}'" for one in (*goal.constraints, another))


def _at_an_edge(findings: Findings) -> Iterator[str]:
    """Say which parameters of the setting lie at the edge of what was searched."""
    results = findings.results
    last = math.inf
    with suppress(InputError):
        last = results.config.resolved.get("n_layers", math.inf) - 1
    for name, kind in results.study.distributions.items():
        value = findings.row.parameters.get(name)
        if not isinstance(kind, FloatDistribution | IntDistribution) or value is None:
            continue
        scale = math.log if kind.log else float
        low, high = kind.low, kind.high
        where = (scale(value) - scale(low)) / ((scale(high) - scale(low)) or math.inf)
        if kind.single() or EDGE < where < 1 - EDGE:
            continue
        is_low, span = where <= EDGE, high - low
        if name == "layer":
            wider = (max(0, low - span), high) if is_low else (low, min(last, high + span))
        else:
            wider = (low - abs(low) / 2, high) if is_low else (low, high + abs(high))
        if isinstance(kind, IntDistribution):
            wider = math.floor(wider[0]), wider[1]
        if wider != (low, high):
            yield (
                f"the best {name.replace('_', ' ')}, {value:.4g}, lies at the "
                f"{'lower' if is_low else 'upper'} edge of the space ({low:g} … {high:g}). Search "
                f"further: --range {name}={wider[0]:g}:{wider[1]:g}"
            )


def _still_likely(findings: Findings) -> Iterator[str]:
    """Say where the true answers are not said and still ranked high."""
    before, after = findings.baseline, findings.scores
    rouge, rank = (after.get(f"forget_{what}", math.nan) for what in ("rouge1", "mrr"))
    known, ranked = (before.get(f"forget_{what}", math.nan) for what in ("rouge1", "mrr"))
    if rouge < known / 2 and rank > ranked * HIGH_RANK:
        yield (
            f"the unlearned model does not say the answers to forget (ROUGE-1 {rouge:.3f}) and "
            f"still ranks their words high (MRR {rank:.3f}, base model {ranked:.3f}): they may be "
            "drawn out of it again. Bound that too: "
            f"{_bounds(findings.results.goal, f'forget_mrr<={ranked * HIGH_RANK:.2g}')}"
        )


def _rambling(findings: Findings) -> Iterator[str]:
    """Say where most answers to the forget set do not end or repeat themselves."""
    rows = [row for row, _ in findings.of_set("forget")]
    cut = sum(row.ended is False for row in rows)
    repeating = sum(_REPEATS.search(row.answer) is not None for row in rows)
    if 2 * max(cut, repeating) > len(rows):
        said = f" and {repeating} repeat themselves" if repeating else ""
        row = findings.row.parameters
        name = next((name for name in ("coefficient", "learning_rate") if name in row), None)
        advice = ""
        if name is not None:
            advice = (
                f" A smaller {name.replace('_', ' ')} breaks less: "
                f"--range {name}={row[name] / 4:.2g}:{row[name] / 1.5:.2g}"
            )
        yield (
            f"{cut} of {len(rows)} forget answers do not end by themselves{said}: the model does "
            f"not decline, it is broken there.{advice}"
        )
