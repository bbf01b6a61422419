"""What a search found beside its scores: its answers, what they lost, and what to be careful of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lunar_tune.errors import InputError
from lunar_tune.metrics.goal import Goal, score_label
from lunar_tune.metrics.names import METRICS
from lunar_tune.study.rows import TrialRow
from lunar_tune.study.stored_search import StoredSearch

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LEAST_TO_FORGET", "Findings", "cautions"]

# A base model that says fewer of the words than this does not know the data.
LEAST_TO_FORGET = 0.3
# What a score may lose unbounded: as much as the usual bound of 0.8 leaves a model that knows all.
FALL = 0.2
# The share of a range that is taken for its edge.
EDGE = 0.02
# The share of the base model's MRR above which an answer counts as ranked high: `tiny`, which knows
# its answers, has 1.00 on them and 0.59 on answers to the same question about somebody else.
HIGH_RANK = 0.8
# An answer that repeats itself to its end: any few characters, five times and more.
REPEATS = re.compile(r"(.{1,40}?)\1{4,}.{0,40}\Z", re.DOTALL)


@dataclass(frozen=True)
class Findings:
    """The answers of a setting, as they were evaluated last."""

    row: TrialRow
    scores: Mapping[str, float]
    baseline: Mapping[str, float]
    """The base model's scores on the same questions."""
    max_new_tokens: int | None
    answers: pd.DataFrame | None
    """See `answers_beside`; None where they are not there."""

    @classmethod
    def of(cls, search: StoredSearch, row: TrialRow) -> Findings:
        """Return those of the setting that a search puts first, confirmed or not."""
        full, answers = search.study.notes.get("confirmed") or {}, None
        with suppress(InputError):
            table = search.answers(row.number, full=bool(full))
            answers = table if len(table) else None
        baseline = search.baseline_in_full if full else search.baseline
        budget = full.get("max_new_tokens", row.max_new_tokens)
        return cls(row, full.get("scores", row.scores), baseline, budget, answers)

    def examples(self, name: str, count: int = 3) -> list[Mapping[str, str | None]]:
        """Return a few answers of a set: of what is to be kept first those that lost most.

        Of those that lost as much, and of the forget set, the edges take turns.
        """
        if self.answers is None or not self.answers["question"].any():  # texts were not kept
            return []
        asked = self.answers[self.answers["set"] == name]
        gain = 0.0 if name == "forget" else (asked["rouge1"] - asked["rouge1_before"]).clip(upper=0)
        order = asked.assign(gain=gain, turn=asked.groupby("edge").cumcount())
        first = order.sort_values(["gain", "turn"], kind="stable").head(count)
        return [one._asdict() for one in first.itertuples()]

    @property
    def endings(self) -> str:
        """How the answers to the forget set end; empty where that is not known."""
        if self.answers is None:
            return ""
        asked = self.answers[self.answers["set"] == "forget"]
        if (asked["ended"].isna() & (asked["rouge_l"] < 1)).any():
            return ""
        ended, cut, left = map(asked["ended"].tolist().count, (True, False, None))
        text = f"{ended} of {len(asked)} forget answers end by themselves, {cut} were cut at "
        text += f"{self.max_new_tokens} tokens"
        return text + (f", {left} were left once they had said the truth" if left else "")

    @property
    def losses(self) -> str:
        """How many answers beside the forget set lost words, and where most; empty if not known."""
        parts = []
        for name in ("retain", "factual"):
            if self.answers is None or not (self.answers["set"] == name).any():
                continue
            asked = self.answers[self.answers["set"] == name]
            lost = int((asked["rouge1"] < asked["rouge1_before"]).sum())
            text = f"{lost} of {len(asked)} {name} answers lost words"
            if lost:
                means = asked.groupby("edge")[["rouge1_before", "rouge1"]].mean()
                edge = (means["rouge1"] - means["rouge1_before"]).idxmin()
                before, after = means.loc[edge]
                text += " (the worst below)" if name == "retain" else ""
                text += f", most on {edge} (ROUGE-1 {before:.3f}, now {after:.3f})"
            parts.append(text)
        return "; ".join(parts)


def cautions(search: StoredSearch, first: TrialRow | None) -> list[str]:
    """Return what somebody who takes the setting that a search puts first should know."""
    found, forget = [], search.baseline.get("forget_rouge1", 1.0)
    if forget < LEAST_TO_FORGET:
        found.append(
            f"the base model never knew the forget set (ROUGE-1 {forget:.3f}): a low forget score "
            "says nothing about unlearning here. Fine-tune the model on the data first."
        )
    if first is not None and first.feasible:
        best = Findings.of(search, first)
        for find in (_fallen, _at_an_edge, _still_likely, _rambling):
            found += find(best, search)
    return found


def _fallen(best: Findings, search: StoredSearch) -> Iterator[str]:
    """Say which scores that nothing bounds fell a lot; ROUGE-L falls with ROUGE-1."""
    before, after = best.baseline, best.scores
    for name in sorted(before.keys() & after.keys() & set(METRICS) - {*search.goal.metrics}):
        metric, fall = METRICS[name], before[name] - after[name]
        kept = not metric.lower_is_better and (metric.low, metric.high) == (0, 1)
        if kept and metric.quantity != "rougeL" and fall > FALL:
            least = f"{name}>={max(0.0, before[name] - FALL):.2g}"
            yield (
                f"{score_label(name)} fell from {before[name]:.3f} to {after[name]:.3f}, and "
                f"nothing bounds it. Bound it: {_bounds(search.goal, least)}"
            )


def _bounds(goal: Goal, another: str) -> str:
    """Return the options for a goal's bounds and another one; given once, they replace all."""
    return " ".join(f"--constrain '{one}'" for one in (*goal.constraints, another))


def _at_an_edge(best: Findings, search: StoredSearch) -> Iterator[str]:
    """Say which parameters of the setting lie at the edge of what was searched."""
    last = math.inf
    with suppress(InputError):
        last = search.config.resolved.get("n_layers", math.inf) - 1
    for name, kind in search.study.ranges.items():
        if (value := best.row.parameters.get(name)) is None:
            continue
        low, high, scale = kind.low, kind.high, math.log if kind.log else float
        where = (scale(value) - scale(low)) / (scale(high) - scale(low))
        below, above = (low - abs(low) / 2, high + abs(high))
        if name == "layer":
            below, above = max(0, 2 * low - high), min(last, 2 * high - low)
        below = math.floor(below) if isinstance(low, int) else below
        for is_there, end, wider in (
            (where <= EDGE and below < low, "lower", f"{below:g}:{high:g}"),
            (where >= 1 - EDGE and above > high, "upper", f"{low:g}:{above:g}"),
        ):
            if is_there:
                yield (
                    f"the best {score_label(name)}, {value:.4g}, lies at the {end} edge of the "
                    f"space ({low:g} … {high:g}). Search further: --range {name}={wider}"
                )


def _still_likely(best: Findings, search: StoredSearch) -> Iterator[str]:
    """Say where the true answers are not said and still ranked high."""
    (said, rank), (known, ranked) = (
        [scores.get(f"forget_{what}", math.nan) for what in ("rouge1", "mrr")]
        for scores in (best.scores, best.baseline)
    )
    if said < known / 2 and rank > ranked * HIGH_RANK:
        yield (
            f"the unlearned model does not say the answers to forget (ROUGE-1 {said:.3f}) and "
            f"still ranks their words high (MRR {rank:.3f}, base model {ranked:.3f}): they may be "
            "drawn out of it again. Bound that too: "
            f"{_bounds(search.goal, f'forget_mrr<={ranked * HIGH_RANK:.2g}')}"
        )


def _rambling(best: Findings, _: StoredSearch) -> Iterator[str]:
    """Say where most answers to the forget set do not end or repeat themselves."""
    if best.answers is None:
        return
    asked = best.answers[best.answers["set"] == "forget"]
    cut = asked["ended"].tolist().count(False)
    repeating = sum(REPEATS.search(answer) is not None for answer in asked["unlearned"])
    if 2 * max(cut, repeating) > len(asked):
        said = f" and {repeating} repeat themselves" if repeating else ""
        advice, setting = "", best.row.parameters
        for name in [name for name in ("coefficient", "learning_rate") if name in setting][:1]:
            wider = f"--range {name}={setting[name] / 4:.2g}:{setting[name] / 1.5:.2g}"
            advice = f" A smaller {score_label(name)} breaks less: {wider}"
        yield (
            f"{cut} of {len(asked)} forget answers do not end by themselves{said}: the model does "
            f"not decline, it is broken there.{advice}"
        )
