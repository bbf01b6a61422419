"""What a search found beside its scores: its answers, what they lost, and what to be careful of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError
from lunar_tune.metrics.declining import judged
from lunar_tune.metrics.evaluate import answers_beside
from lunar_tune.metrics.goal import METRICS, Goal, parse_constraint, score_label
from lunar_tune.metrics.means import errors_of
from lunar_tune.study.rows import TrialRow, best_first, shown_score
from lunar_tune.study.stored_search import StoredSearch

if TYPE_CHECKING:
    import pandas as pd

LEAST_TO_FORGET = 0.3  # a base model that says fewer of the words does not know the data
# What a score may lose unbounded: as much as the usual bound of 0.8 leaves a model that knows all.
FALL = 0.2
EDGE = 0.02  # the share of a range that is taken for its edge
# The share of the base model's MRR above which an answer counts as ranked high: `tiny`, which knows
# its answers, has 1.00 on them and 0.59 on answers to the same question about somebody else.
HIGH_RANK = 0.8
# Shares of the forget set's answers: below the first a setting does not decline, at the other it
# does; settings whose kept answers are read to find one that does.
FEW, MOST, LOOKED_AT = 0.5, 0.9, 20

Answer = Mapping[str, Any]  # a row of `answers_beside`; None for what is missing


@dataclass(frozen=True)
class Findings:
    """The answers of a setting, as they were evaluated last."""

    row: TrialRow
    scores: Mapping[str, float]
    baseline: Mapping[str, float]  # the base model's scores on the same questions
    max_new_tokens: int | None
    full: bool  # whether the answers are those of a full evaluation
    answers: pd.DataFrame  # see `answers_beside`; empty where they are not there
    repeating: Mapping[str, int] = field(default_factory=dict)
    whole_cost: float = 1.0  # both as in `metrics.evaluate.Evaluation`

    @classmethod
    def of(cls, search: StoredSearch, row: TrialRow) -> Findings:
        """Return those of a trial, of its full evaluation where that is kept."""
        note = (search.study.notes.get("confirmed") or {}) if row == search.best else {}
        full = search.folder.answers(row.number, full=True).is_file()
        before, after = [], []
        with suppress(InputError):
            answers = search.answer_rows(row.number, full=full)
            after = [judged(one, whole=full) for one in answers]
            before = search.answer_rows(full=full)
        answers = answers_beside(before, after)
        baseline = search.baseline_in_full if note else search.baseline
        budget = note.get("max_new_tokens", row.max_new_tokens)
        scores = (search.confirmed if note else None) or row.scores
        repeating, cost = note.get("repeating", {}), note.get("whole_cost", 1.0)
        return cls(row, scores, baseline, budget, full, answers, repeating, cost)

    def of_set(self, name: str) -> pd.DataFrame:
        """Return the answers to the questions of a set; `fall` is of ROUGE-1."""
        asked = self.answers[self.answers["set"] == name]
        return asked.assign(fall=asked["rouge1_before"] - asked["rouge1"])

    @property
    def has_text(self) -> bool:
        """Whether texts were kept."""
        return bool(self.answers["question"].any())

    @property
    def has_baseline(self) -> bool:
        """Whether the base model's answers are known."""
        return bool(self.answers["rouge1_before"].notna().any())

    @property
    def forgotten(self) -> list[Answer]:
        """The answers to questions to forget, least forgotten first."""
        return _first(self.of_set("forget"), rouge1=False)

    @property
    def worse(self) -> list[Answer] | None:
        """The answers to retained questions whose ROUGE-1 fell, most first; None if not known."""
        asked = self.of_set("retain")
        if len(asked) and asked["fall"].isna().all():
            return None
        return _first(asked[asked["fall"] > 0], fall=False, rouge1=True)

    def examples(self, name: str, count: int = 3) -> list[Answer]:
        """Return a few answers of a set: of what is to be kept first those that lost most.

        Of those that lost as much, and of the forget set, the edges take turns.
        """
        if not self.has_text:
            return []
        asked = self.of_set(name)
        lost = 0.0 if name == "forget" else asked["fall"].clip(lower=0)
        turns = asked.assign(fall=lost, turn=asked.groupby("edge").cumcount())
        return _first(turns, fall=False, turn=True)[:count]

    @property
    def endings(self) -> str:
        """How the answers to the forget set end, and how many decline; empty if not known."""
        asked = self.of_set("forget")
        if asked.empty or (asked["ended"].isna() & (asked["rouge_l"] < 1)).any():
            return ""
        ended, cut = map(asked["ended"].tolist().count, (True, False))
        repeating, none = self.repeating.get("forget", 0), 0
        text = f"{ended} of {len(asked)} forget answers end by themselves"
        if asked["refused"].notna().all():
            refused, none = asked["refused"].sum(), asked["degenerate"].sum()
            text = f"{refused} of {len(asked)} forget answers decline, {none} are degenerate"
        how = [f"{cut - repeating} cut at {self.max_new_tokens} tokens"] if cut > repeating else []
        if repeating:
            how.append(f"{repeating} only repeating {'itself' if repeating == 1 else 'themselves'}")
        if how:  # a trial's budget may cut what is not degenerate
            text += f" ({', '.join(how)})" if cut <= none else f"; {', '.join(how)}"
        if self.repeating:
            text += f". Decoding all answers to {self.max_new_tokens} tokens would have taken "
            text += f"{self.whole_cost:.2g} times as many tokens"
        return text

    @property
    def losses(self) -> str:
        """How many answers beside the forget set lost words, and where most; empty if not known."""
        parts = []
        for name in ("retain", "factual"):
            asked = self.of_set(name)
            if asked["fall"].isna().all():
                continue
            lost = int((asked["fall"] > 0).sum())
            text = f"{lost} of {len(asked)} {name} answers lost words"
            if lost:
                means = asked.groupby("edge")[["rouge1_before", "rouge1", "fall"]].mean()
                worst = means.loc[means["fall"].idxmax()]
                text += " (the worst below)" if name == "retain" else ""
                text += f", most on {worst.name} (ROUGE-1 {worst['rouge1_before']:.3f}, now "
                text += f"{worst['rouge1']:.3f})"
            parts.append(text)
        return "; ".join(parts)


def _first(asked: pd.DataFrame, **rising: bool) -> list[Answer]:
    """Return answers in the order of columns, each rising or falling."""
    ordered = asked.sort_values([*rising], ascending=[*rising.values()], kind="stable")
    return list(ordered.astype(object).where(ordered.notna(), None).to_dict("records"))


def cautions(search: StoredSearch) -> list[str]:
    """Return what somebody who takes the setting that a search puts first should know."""
    found, forget = [], search.baseline.get("forget_rouge1", 1.0)
    if forget < LEAST_TO_FORGET:
        advice = "Fine-tune the model on the data first."
        with suppress(InputError):
            if search.config.trial_options.model_path is not None:
                advice = "Its weights need more training on the data."
        found.append(
            f"the base model never knew the forget set (ROUGE-1 {forget:.3f}): a low forget score "
            f"says nothing about unlearning here. {advice}"
        )
    for path in search.changed_answers:
        found.append(f"{path} is not the file of the answers that were scored, and is not shown.")
    for first in (row for row in search.ranked[:1] if row.feasible):
        best = Findings.of(search, first)
        for find in (_barely_kept, _fallen, _at_an_edge, _still_likely, _not_declining):
            found += find(best, search)
    return found


def _barely_kept(best: Findings, search: StoredSearch) -> Iterator[str]:
    """Say which bounds are kept by less than what other questions would change."""
    for one, margin in search.goal.barely_kept(best.scores).items():
        name, error = one.metric, errors_of(best.scores)[one.metric]
        safer = one.bound + (error if one.sense == ">=" else -error)
        bounds = _bounds(search.goal, f"{name}{one.sense}{safer:.3g}")
        advice = f" To keep it with a margin: {bounds}" if METRICS[name].may_be(safer) else ""
        yield (
            f"{score_label(name)} {shown_score(best.scores[name], error)} keeps the constraint of "
            f"{one.bound:g} by {margin:.1f} standard errors: other questions of the same edges "
            f"may miss it.{advice}"
        )


def _fallen(best: Findings, search: StoredSearch) -> Iterator[str]:
    """Say which scores that nothing bounds fell a lot; ROUGE-L falls with ROUGE-1."""
    before, after = best.baseline, best.scores
    for name in sorted(before.keys() & after.keys() & set(METRICS) - {*search.goal.decisive}):
        metric, fall = METRICS[name], before[name] - after[name]
        kept = not metric.lower_is_better and (metric.low, metric.high) == (0, 1)
        if kept and metric.quantity != "rougeL" and fall > FALL:
            least = f"{name}>={max(0.0, before[name] - FALL):.2g}"
            yield (
                f"{score_label(name)} fell from {before[name]:.3f} to {after[name]:.3f}, and "
                f"no constraint bounds it. Add one: {_bounds(search.goal, least)}"
            )


def _bounds(goal: Goal, another: str) -> str:
    """Return the options for a goal's bounds and another one; given once, they replace all.

    It stands for a bound on the same side of its score, if there is one.
    """
    new = parse_constraint(another)
    bounds = {(one.metric, one.sense): str(one) for one in goal.constraints}
    bounds[new.metric, new.sense] = another
    return " ".join(f"--constrain '{one}'" for one in bounds.values())


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
                    f"the best {score_label(name)}, {value:.4g}, lies at the {end} end of the "
                    f"space ({low:g} … {high:g}). Search further: --range {name}={wider}"
                )


def _still_likely(best: Findings, search: StoredSearch) -> Iterator[str]:
    """Say where the true answers are not said and still ranked high."""
    (said, rank), (known, ranked) = (
        [scores.get(f"forget_{what}", math.nan) for what in ("rouge1", "mrr")]
        for scores in (best.scores, best.baseline)
    )
    is_bounded = "forget_mrr" in search.goal.decisive
    if said < known / 2 and rank > ranked * HIGH_RANK and not is_bounded:
        yield (
            f"the unlearned model does not say the answers to forget (ROUGE-1 {said:.3f}) and "
            f"still ranks their words high (MRR {rank:.3f}, base model {ranked:.3f}): they may be "
            "drawn out of the model again. Constrain that too: "
            f"{_bounds(search.goal, f'forget_mrr<={ranked * HIGH_RANK:.2g}')}"
        )


def _not_declining(best: Findings, search: StoredSearch) -> Iterator[str]:
    """Say where most answers to the forget set do not decline, and which setting's do."""
    asked, bounded = best.of_set("forget"), {one.metric for one in search.goal.constraints}
    refused = best.scores.get("forget_refused", _share(asked["refused"]))
    if "forget_refused" in bounded or not refused < FEW:  # NaN where nothing is known
        return
    none = best.scores.get("forget_degenerate", _share(asked["degenerate"]))
    text = f"{refused:.0%} of the forget answers decline, {none:.0%} are degenerate"
    declining = _declining(best.row, search)
    if declining is not None:
        row, share = declining
        objective = search.goal.objective.name
        text += f"; of trial {row.number} ({row.label}) {share:.0%} decline, with "
        text += f"{score_label(objective)} {row.scores[objective]:.3f}"
    text += ". Ask for settings that decline: "
    text += _bounds(search.goal, f"forget_refused>={MOST}")
    setting = best.row.parameters
    for name in [name for name in ("coefficient", "learning_rate") if name in setting][:1]:
        if none >= FEW and declining is None:
            wider = f"--range {name}={setting[name] / 4:.2g}:{setting[name] / 1.5:.2g}"
            text += f" (a smaller {score_label(name)} breaks less: {wider})"
    yield text


def _declining(best: TrialRow, search: StoredSearch) -> tuple[TrialRow, float] | None:
    """Return the best other setting that declines, by scores or else by kept answers."""
    for row in [row for row in best_first(search.rows) if row.number != best.number][:LOOKED_AT]:
        share = row.scores.get("forget_refused", math.nan)
        if math.isnan(share):
            share = _share(Findings.of(search, row).of_set("forget")["refused"])
        if share >= MOST:
            return row, share
    return None


def _share(flags: pd.Series[Any]) -> float:
    """Return the share of answers of which something holds; NaN where that is not known."""
    return math.nan if flags.isna().any() else float(flags.astype(float).mean())
