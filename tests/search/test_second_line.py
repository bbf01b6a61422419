"""The second line of a goal: which of the settings that the objective cannot tell apart is best."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from invented_searches import results_of, trial
from made_outcomes import base_model, ended
from optuna.distributions import FloatDistribution, IntDistribution
from scipy.stats import norm
from test_loop import Heard
from test_study import study_in
from tracked_searches import SPACE as WHOLE_SPACE

from lunar_tune.driver.stopping import Outlook
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.metrics.goal import Goal
from lunar_tune.study.new_questions import Gap, gap_of, kept_again, note_of_kept_again
from lunar_tune.study.rows import TrialRow, alike, best_first, best_so_far
from lunar_tune.study.study import EQUAL, Study, Told, at_second
from lunar_tune.trial.tasks import CONFIRMATION, Outcome

KEEPING = Goal.read("forget_rouge1", ["retain_rouge1>=0.8"])
FLOOR = str(KEEPING.constraints[0])


def row(number: int, forget: float, error: float, retain: float) -> TrialRow:
    one = trial(number, forget, retain, {"layer": number})
    return dataclasses.replace(one, error=error, second=-retain, feasible=retain >= 0.8)


ROWS = [
    row(0, 0.10, 0.03, 0.85),
    row(1, 0.13, 0.01, 0.95),  # .03 from the lowest, whose error and its own are .0316 together
    row(2, 0.12, 0.00, 0.90),
    row(3, 0.14, 0.02, 0.99),  # .04 from it; errors .036
    row(4, 0.02, 0.05, 0.70),  # misses the floor
]


def test_equal_within_the_standard_errors_the_one_that_keeps_most_is_best() -> None:
    assert [one.number for one in alike(ROWS)] == [1, 2, 0]
    assert [one.number for one in best_first(ROWS)] == [1, 2, 0, 3]
    assert [one.number for one in best_first(ROWS[3:])] == [3]
    exact = [dataclasses.replace(one, error=0.0) for one in ROWS]
    assert [one.number for one in best_first(exact)] == [0, 2, 1, 3], "nothing is equal"
    assert [best.number for _, best in best_so_far(ROWS)] == [0, 1, 1, 1, 1]
    shuffled = random.Random(3).sample(ROWS, len(ROWS))
    assert best_first(shuffled) == best_first(ROWS)


def test_a_report_names_what_cannot_be_told_apart() -> None:
    results = results_of(ROWS, confirmed={"forget_rouge1": 0.13, "retain_rouge1": 0.95})
    said = (
        "forget ROUGE-1 does not tell trials 1, 2, 0 apart; the first has the best retain ROUGE-1"
    )
    assert results.equals == said
    exact = [dataclasses.replace(one, error=0.0) for one in ROWS]
    alone = results_of(exact, confirmed={"forget_rouge1": 0.1, "retain_rouge1": 0.85})
    assert alone.equals is None


def test_where_the_best_keeps_the_floor_by_luck_a_surer_one_is_named() -> None:
    """Retain is .98 - .05 c; where c is 4 that is .78, and was measured as .805."""
    told = [
        Told(
            {"coefficient": c},
            1 - c / 7,
            {FLOOR: 0.8 - (0.805 if c == 4 else 0.98 - 0.05 * c)},
            bound_errors={FLOOR: 0.03},
        )
        for c in (1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
    ]
    rows = [trial(n, one.value, 0.9, dict(one.parameters)) for n, one in enumerate(told)]
    space = {"coefficient": FloatDistribution(0.5, 6.0)}
    note = note_of_kept_again(space, told, rows[4::-1], KEEPING, None)
    number, chance = note["surer"]
    assert number == 3
    assert note["kept_again"] < 0.5 < chance
    alone = note_of_kept_again(space, told, rows[3::-1], KEEPING, None)
    assert alone == {"kept_again": chance, "gap": None, "surer": None}
    assert note_of_kept_again(space, told[:4], rows[3::-1], KEEPING, None) == {}
    note = note_of_kept_again(space, told, rows[4::-1], KEEPING, Gap(0.12, 0.02, 40, 0.7))
    assert note["kept_again"] < 0.1
    assert note["surer"] is None, "what keeps enough forgets too little to be named"

    results = results_of(ROWS, confirmed={"forget_rouge1": 0.13, "retain_rouge1": 0.95})
    note = {"kept_again": 0.43, "surer": (3, 0.71), "gap": None}
    results.study.notes["new_questions"] = note
    said = "on as many new questions of the same kind it keeps retain ROUGE-1 of at least 0.8: "
    assert results.kept_again == f"{said}43% likely; trial 3 (forget ROUGE-1 0.14): 71%"
    gap = {"mean": 0.102, "error": 0.03, "rows": 70, "unseen": 0.741}
    results.study.notes["new_questions"] = {**note, "gap": gap, "surer": None}
    assert results.kept_again == (
        f"{said}43% likely (retain ROUGE-1 on 70 of the questions is 0.741 where the fit did not "
        "see them, 0.843 where it did)"
    )


def answers(*recalls: float) -> list[AnswerRow]:
    facts = {"set_name": "retain", "edge": "B_C", "truth": "so", "answer": "so", "rouge_l": 0.0}
    return [
        AnswerRow(question=f"{n}?", rouge1=recall, row=n, **facts)
        for n, recall in enumerate(recalls)
    ]


def test_a_gap_is_of_the_same_questions_with_one_more_in_its_error() -> None:
    """The error is that of a mean of 4, had a fifth been off by 1 from it."""
    fitted, unseen = answers(1.0, 0.9, 0.5, 1.0, 1.0, 0.0), answers(1.0, 0.5, 0.6, 0.0)
    gap = gap_of(fitted, unseen[::-1])
    assert gap is not None
    lost = [0.0, 0.4, -0.1, 1.0]
    assert (gap.mean, gap.rows) == (pytest.approx(np.mean(lost)), 4)
    assert gap.unseen == pytest.approx(np.mean([1.0, 0.5, 0.6, 0.0]))
    squares = np.var(lost) * 4 + 1
    assert gap.error == pytest.approx((squares / 4 / 5) ** 0.5)
    same = gap_of(fitted, fitted)
    assert same is not None
    assert same.mean == 0 < same.error < gap.error
    assert gap_of(fitted, []) is None


def test_a_gap_moves_the_chance_as_its_mean_and_its_error_say() -> None:
    """One setting, told so often that its score is known: the rest is a normal distribution."""
    space = {"coefficient": FloatDistribution(0.5, 6.0)}
    told = [
        Told({"coefficient": c}, 0.1, {FLOOR: -0.04}, bound_errors={FLOOR: 0.03})
        for c in np.linspace(0.5, 6.0, 40)
    ]
    grid = np.linspace(-1, 1, 4001)  # of gaps, which are normal around none with .1
    for mean, error in ((0.05, 0.001), (0.04, 0.05), (-0.02, 0.02), (0.3, 0.2)):
        chances = kept_again(space, told, {FLOOR: Gap(mean, error, 40, 0.7)})
        assert chances is not None
        likely = norm.pdf(grid, 0, 0.1) * norm.pdf(mean, grid, error)
        expected = np.average(norm.cdf((0.04 - grid) / 0.03), weights=likely)
        assert chances[20] == pytest.approx(expected, abs=0.03), (mean, error)


def test_at_the_second_line_the_first_is_a_bound() -> None:
    told = [
        Told({"layer": 1}, 0.10, {"retain": -0.05}, error=0.03, second=-0.85),
        Told({"layer": 2}, 0.13, {"retain": -0.15}, error=0.01, second=-0.95),
        Told({"layer": 3}, 0.01, {"retain": 0.10}, error=0.01, second=-0.70),
        Told({"layer": 4}, 1.00, {"retain": 0.80}),  # failed
    ]
    aimed = at_second(told)
    assert [one.value for one in aimed] == [-0.85, -0.95, -0.70, -0.70]
    assert [one.is_feasible for one in aimed] == [True, True, False, False]
    assert aimed[1].missed[EQUAL] == pytest.approx(0.03 - 0.001**0.5)
    assert aimed[3].missed == {"retain": 0.80, EQUAL: pytest.approx(0.9 - 0.03)}


GOAL = Goal.read("forget_rouge1", [])
SPACE = dataclasses.replace(
    WHOLE_SPACE,
    parameters={"layer": IntDistribution(0, 7), "coefficient": FloatDistribution(0.5, 6.0)},
    starting_points=(),
)


class InSpace(Heard):
    """A loop on a study of two parameters."""

    def begin(self, _: Outcome) -> Study:
        study = study_in(self.folder.path, space=SPACE, seed=self.loop.config.seed)
        study.note("goal", GOAL.text)
        return study


def scores(parameters: dict[str, float]) -> tuple[float, float]:
    """Return forget and retain; nothing is left from 2 on, and block 5 keeps most there: .96."""
    loss = 0.02 + 0.004 * abs(parameters["layer"] - 5)
    return max(0.0, 1 - parameters["coefficient"] / 2), 1 - loss * parameters["coefficient"]


@pytest.mark.parametrize("seed", range(2))
def test_once_nothing_is_left_to_forget_a_search_looks_for_what_keeps_most(
    tmp_path: Path, seed: int
) -> None:
    heard = InSpace(tmp_path, num_trials=60, seed=seed)
    heard.next("base")
    heard.loop.take("base", base_model())
    while (task := heard.next("one")).kind != CONFIRMATION:
        heard.loop.take("one", ended(*scores(dict(task.parameters))))
    rows = heard.study.rows()
    best = best_first(rows)[0]
    assert best.objective == 0
    assert best.scores["retain_rouge1"] > 0.96 - 0.011
    assert task.number == best.number
    first = next(one.number for one in rows if one.objective == 0)
    assert first + 3 < len(rows) < 40
    assert heard.study.stored.notes["outlook"]["enough"]


def test_the_second_line_waits_for_something_feasible_and_known() -> None:
    """Journals of earlier versions have not kept it; a setting that misses has no equals."""
    for miss, second in ((0.5, -0.3), (-0.1, None)):
        told = [
            Told({"layer": n % 8, "coefficient": 0.6 + n / 5}, 0.0, {"b": miss}, second=second)
            for n in range(24)
        ]
        outlook = Outlook(goal=GOAL, space=SPACE.parameters, seed=0)
        assert not outlook.is_at_second(told)
        assert outlook.second_chance(told) == 0


def test_one_setting_alone_leaves_nothing_to_gain() -> None:
    fixed = {"layer": IntDistribution(3, 3), "coefficient": FloatDistribution(2.0, 2.0)}
    told = [Told({"layer": 3, "coefficient": 2.0}, 0.5, {"b": -0.1}, second=-0.9)] * 7
    outlook = Outlook(goal=GOAL, space=fixed, seed=0)
    assert outlook.is_enough(told)
    assert outlook.before(told) == {"chance": 0.0, "least": 0.5}
    known = [dataclasses.replace(one, bound_errors={"b": 0.1}) for one in told]
    assert kept_again(fixed, known) is None
