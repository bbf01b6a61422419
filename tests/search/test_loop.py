"""The loop of a search without whoever runs its tasks: what runs next, what an outcome means."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
from made_outcomes import N_RETAIN, base_model, ended, failed, trial_result
from optuna.trial import TrialState
from test_study import frozen, study_in

from lunar_tune.config.options import SearchConfig
from lunar_tune.driver.loop import DONE, SearchLoop, keep_answers
from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.metrics.goal import goal_of
from lunar_tune.study.folder import Folder
from lunar_tune.study.rows import COMPLETE, FAILED, RUNNING, TrialRow
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import Study
from lunar_tune.trial.references import References
from lunar_tune.trial.tasks import BASE_MODEL, CONFIRMATION, NEW_QUESTIONS, TRIAL, Outcome, Task

KILLED = "RuntimeError: killed"


UNSEEN = AnswerRow(
    set_name="retain", edge="B_C", question="?", truth="so", answer="so", rouge1=1.0, rouge_l=1.0
)


class Heard:
    """A loop on a study in a temporary folder, and what its listener heard."""

    def __init__(
        self,
        folder: Path,
        refuses: bool = False,
        coefficient: float | None = None,
        known_model: Any = None,
        **options: Any,
    ) -> None:
        self.folder, self.refuses = Folder(folder), refuses
        self.news: list[tuple[str, Any]] = []
        config = SearchConfig(**{"num_trials": 3} | options)
        facts = {"n_retain": N_RETAIN, "layer_coefficient": coefficient, "known_model": known_model}
        self.loop = SearchLoop(self, self.folder, config, **facts)

    def begin(self, outcome: Outcome) -> Study:
        scores = outcome.result.evaluation.scores
        self.news.append(("base model", (scores["forget_rouge1"], outcome.plain_decoding)))
        self.layer_prior = outcome.layer_prior
        if self.refuses:
            raise InputError("nothing to forget")
        study = study_in(self.folder.path)
        study.note("goal", goal_of(self.loop.config).text)
        return study

    def ended(self, row: TrialRow) -> None:
        assert self.study.row(row.number) == row, "the study has it already"
        self.news.append(("end", row))

    def confirming(self, row: TrialRow) -> None:
        self.news.append(("confirming", row.number))

    def confirmed(self, row: TrialRow, outcome: Outcome, *, holds: bool) -> None:
        if outcome.failure is not None:
            self.news.append(("unconfirmed", (row.number, outcome.failure.reason)))
        else:
            self.news.append(("holds" if holds else "falls", row.number))

    def generalising(self, row: TrialRow) -> None:
        self.news.append(("generalising", row.number))

    def generalised(self, row: TrialRow, outcome: Outcome) -> None:
        self.news.append(("generalised", (row.number, bool(outcome.unseen))))

    @property
    def study(self) -> Study:
        return self.loop.study

    def next(self, task_id: str) -> Task:
        task = self.loop.next(task_id)
        assert isinstance(task, Task)
        return task

    def trials(self, *outcomes: Outcome) -> None:
        for outcome in outcomes:
            assert not self.loop.gave_up
            task_id = f"t{len(self.news)}"
            assert self.next(task_id).kind == TRIAL
            self.loop.take(task_id, outcome)

    def lose(self, *task_ids: str) -> list[Task]:
        """Begin tasks and lose their workers; return the tasks."""
        tasks = []
        for task_id in task_ids:
            tasks.append(self.next(task_id))
            self.loop.lose(task_id, KILLED)
        return tasks

    def confirm(self, task_id: str, retain: float) -> int:
        """Evaluate the next candidate in full; return its number."""
        task = self.next(task_id)
        assert task.kind == CONFIRMATION
        self.loop.take(task_id, ended(0.1, retain))
        return task.number


@pytest.fixture(autouse=True)
def two_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """End a search after two failed trials in a row."""
    monkeypatch.setattr("lunar_tune.driver.loop.MAX_FAILURES", 2)


def begun(folder: Path, **options: Any) -> Heard:
    one = Heard(folder, **options)
    assert one.next("base").kind == BASE_MODEL
    one.loop.take("base", base_model())
    return one


@pytest.fixture
def heard(tmp_path: Path) -> Heard:
    return begun(tmp_path)


@pytest.mark.parametrize(("coefficient", "prior"), [(None, None), (0.5, "the prior")])
def test_the_base_model_comes_first_and_everything_waits_for_it(
    tmp_path: Path, coefficient: float | None, prior: str | None
) -> None:
    heard = Heard(tmp_path, coefficient=coefficient)
    assert heard.next("1").layer_coefficient == coefficient
    assert heard.loop.next("2") is None
    heard.loop.take("1", base_model(plain_decoding="a window", layer_prior=prior))
    assert heard.news == [("base model", (1.0, "a window"))]
    assert heard.layer_prior == prior
    assert heard.next("2").kind == TRIAL


def test_a_model_that_is_refused_or_cannot_be_evaluated_ends_the_loop(tmp_path: Path) -> None:
    heard = begun(tmp_path, refuses=True)
    assert (type(heard.loop.error), str(heard.loop.error)) == (InputError, "nothing to forget")
    assert heard.loop.next("1") == DONE
    assert heard.loop.study is None
    for wrong_input, kind in ((True, InputError), (False, LunarTuneError)):
        heard = Heard(tmp_path)
        heard.next("1")
        heard.loop.take("1", failed("no weights", wrong_input=wrong_input))
        assert (type(heard.loop.error), str(heard.loop.error)) == (kind, "no weights")
        assert heard.loop.next("2") == DONE
    heard = Heard(tmp_path)
    heard.lose("1", "2")
    assert heard.loop.error is None
    heard.lose("3")
    assert str(heard.loop.error) == KILLED
    assert heard.loop.next("4") == DONE


def test_a_task_is_a_trial_and_its_end_is_heard_when_the_study_has_it(heard: Heard) -> None:
    tasks = [heard.next("ray-1"), heard.next("ray-2")]
    for number, task in enumerate(tasks):
        row = heard.study.row(number)
        assert task == Task(kind=TRIAL, number=number, parameters=row.parameters)
        assert (row.state, heard.news[1:]) == (RUNNING, [])
    heard.loop.take("ray-2", ended(forget=0.7))
    heard.loop.take("ray-1", ended(forget=0.4))
    for number, forget in ((1, 0.7), (0, 0.4)):
        what, row = heard.news[-1 - number]
        assert (what, row.number, row.scores["forget_rouge1"]) == ("end", number, forget)
        assert heard.study.row(number) == row
        answers = heard.folder.answers(number).read_bytes()
        assert hashlib.sha256(answers).hexdigest() == row.answers_digest


def test_no_trial_starts_after_the_deadline(tmp_path: Path) -> None:
    heard = begun(tmp_path, time_budget=0.0)
    assert heard.loop.next("ray-1") == DONE
    assert (heard.loop.gave_up, heard.study.rows()) == (False, [])


def test_too_many_failures_in_a_row_end_the_trials(tmp_path: Path) -> None:
    """A score that is not finite is one, too."""
    heard = begun(tmp_path, num_trials=9)
    heard.trials(failed("the loss became NaN"), ended(), failed("x"), ended(forget=math.nan))
    row = heard.study.row(0)
    assert (row.state, row.failure) == (FAILED, "the loss became NaN")
    assert heard.loop.gave_up
    assert heard.confirm("5", retain=0.9) == 1, "what was found is confirmed all the same"
    assert heard.loop.next("6") == DONE
    assert len(heard.study.rows()) == 4


def test_the_best_is_confirmed_when_the_last_trial_has_ended(heard: Heard) -> None:
    heard.trials(ended(forget=0.3), ended(forget=0.1))
    assert heard.next("3").kind == TRIAL
    assert heard.loop.next("4") is None, "a trial is running still"
    heard.loop.take("3", ended(forget=0.2))
    assert heard.confirm("5", retain=0.8) == 1, "a floor that is just reached holds"
    assert heard.news[-2:] == [("confirming", 1), ("holds", 1)]
    assert heard.loop.next("6") == DONE


def test_candidates_are_confirmed_until_one_keeps_the_floor(heard: Heard) -> None:
    """A full disk does not pass over one; what fails, or is lost three times, does."""
    heard.trials(*(ended(forget=forget) for forget in (0.3, 0.1, 0.2)))
    assert heard.confirm("4", retain=0.79) == 1
    heard.next("5")
    assert heard.loop.next("6") is None, "one confirmation at a time"
    heard.loop.take("5", failed("OSError: No space left", transient=True))
    assert [task.number for task in heard.lose("6", "7")] == [2, 2], "three attempts"
    assert heard.next("8").number == 0
    heard.loop.take("8", failed("the loss became NaN"))
    assert heard.loop.next("9") == DONE
    kinds = {"confirming", "holds", "falls", "unconfirmed"}
    assert [news for news in heard.news if news[0] in kinds] == [
        *(("confirming", 1), ("falls", 1), *[("confirming", 2)] * 3, ("unconfirmed", (2, KILLED))),
        *(("confirming", 0), ("unconfirmed", (0, "the loss became NaN"))),
    ]


def test_what_was_held_out_does_not_choose_between_settings(tmp_path: Path) -> None:
    heard = begun(tmp_path, holdout=True)
    heard.trials(ended(), ended(), ended())
    heard.confirm("4", retain=0.1)
    assert heard.loop.next("5") == DONE
    assert "holds" in dict(heard.news)


def test_answers_written_again_are_taken_for_exchanged_at_no_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = begun(tmp_path)
    path = heard.folder.answers(None)
    keep_answers(heard.study, path, trial_result(1.0, 0.9), text=True)

    def killed(path: Path, *_: Any, **__: Any) -> str:
        path.write_bytes(b"other answers")
        raise KeyboardInterrupt

    def exchanged() -> list[Path]:
        return StoredSearch(folder=heard.folder, study=heard.study.stored).changed_answers

    assert exchanged() == []
    with monkeypatch.context() as patch:
        patch.setattr("lunar_tune.driver.loop.write_result", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_answers(heard.study, path, trial_result(1.0, 0.8), text=True)
    assert exchanged() == []
    keep_answers(heard.study, path, trial_result(1.0, 0.8), text=True)
    path.write_bytes(b"other answers")
    assert exchanged() == [path]


def test_a_trial_whose_worker_is_lost_runs_again_and_is_counted_once(heard: Heard) -> None:
    (first,) = heard.lose("1")
    assert heard.next("2").parameters == first.parameters
    heard.loop.lose("2", None)
    heard.trials(ended(), ended(), ended())
    rows = heard.study.rows()
    assert [row.state for row in rows] == [FAILED, FAILED, COMPLETE, COMPLETE, COMPLETE]
    assert [row.failure for row in rows[:2]] == [KILLED, "the trial ended without a result"]
    assert heard.confirm("5", retain=0.9) == 2


def test_a_trial_whose_worker_is_lost_three_times_is_taken_to_be_at_fault(tmp_path: Path) -> None:
    heard = begun(tmp_path, num_trials=2)
    first, *others = heard.lose("1", "2", "3")
    assert [task.parameters for task in others] == [first.parameters] * 2
    heard.trials(ended())
    assert [row.again for row in heard.study.rows()] == [True, True, False, False]
    assert heard.study.row(2).failure == f"{KILLED} (3 attempts)"
    assert heard.confirm("5", retain=0.9) == 3, "the trial at fault counts, the others do not"


def test_a_node_that_takes_all_its_trials_with_it_does_not_end_the_search(tmp_path: Path) -> None:
    heard = begun(tmp_path, num_trials=8)
    settings = [heard.next(str(n)).parameters for n in range(8)]
    for n in range(8):
        heard.loop.lose(str(n), "RuntimeError: node lost")
    assert not heard.loop.gave_up
    assert [heard.next(f"again-{n}").parameters for n in range(8)] == settings


def test_a_worker_whose_model_is_another_ends_the_search_and_no_setting(tmp_path: Path) -> None:
    """Each compares with what the first found, or an earlier process did."""
    heard = Heard(tmp_path, known_model={"weights": ["float32", "a"]})
    assert heard.next("base").known_model == {"weights": ["float32", "a"]}
    heard = Heard(tmp_path)
    assert heard.next("base").known_model is None
    heard.loop.take("base", base_model(model={"weights": ["float32", "b"]}))
    task = heard.next("1")
    assert task.known_model == {"weights": ["float32", "b"]}
    heard.loop.take("1", failed("its weights changed", wrong_input=True, no_worker=True))
    assert (type(heard.loop.error), str(heard.loop.error)) == (InputError, "its weights changed")
    assert heard.loop.next("2") == DONE
    assert heard.study.row(0).again, "the setting is queued"
    assert study_in(tmp_path).ask()[1] == task.parameters


def test_what_was_found_of_the_reference_prompts_goes_with_every_later_task(tmp_path: Path) -> None:
    heard, found = Heard(tmp_path), References(asked=3, declined=(0, 2))
    assert heard.next("base").known_references is None
    heard.loop.take("base", base_model(references=found))
    assert heard.next("1").known_references == found


def test_a_confirmation_by_another_model_confirms_nothing(heard: Heard) -> None:
    heard.trials(*[ended()] * 3)
    assert heard.next("c").kind == CONFIRMATION
    heard.loop.take("c", failed("its weights changed", wrong_input=True, no_worker=True))
    assert str(heard.loop.error) == "its weights changed"
    assert heard.loop.next("d") == DONE
    assert not heard.loop.found


def test_a_full_disk_is_no_settings_fault_and_ends_the_search_all_the_same(heard: Heard) -> None:
    """Each setting has three attempts; the sampler hears nothing of it."""
    heard.trials(*[failed("OSError: No space left on device", transient=True)] * 6)
    assert heard.loop.gave_up
    assert [row.again for row in heard.study.rows()] == [True, True, False] * 2
    assert len(heard.study.ended) == 2
    assert [trial.state for trial in frozen(heard.folder.path)] == [TrialState.FAIL] * 6


@pytest.mark.parametrize("where", ["asking", "telling", "hearing"])
def test_an_error_of_the_search_itself_ends_it_and_is_kept_as_it_is(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Tune would turn it into a text; a full disk is to be told as one."""
    error = OSError(28, "No space left on device")

    def full(*_: Any, **__: Any) -> None:
        raise error

    if where == "asking":
        monkeypatch.setattr(heard.study, "ask", full)
        assert heard.loop.next("1") == DONE
    else:
        heard.next("1")
        owner, name = (heard.study, "complete") if where == "telling" else (heard, "ended")
        monkeypatch.setattr(owner, name, full)
        heard.loop.take("1", ended())
    assert heard.loop.error is error
    assert heard.loop.next("2") == DONE


@pytest.mark.parametrize(
    ("bound", "count", "news"),
    [
        ("retain_rouge1>=0.5", 4, [("generalised", (0, False))]),
        ("forget_rouge1<=1", 4, [("generalised", (0, False))]),
        ("forget_rouge1<=1", 5, [("generalised", (0, False))]),
        ("retain_rouge1>=0.5", 5, [("generalising", 0), ("generalised", (0, True))]),
    ],
)
def test_what_is_confirmed_is_asked_new_questions_where_that_has_a_use(
    tmp_path: Path, bound: str, count: int, news: list[Any]
) -> None:
    """Of a floor of retain ROUGE-1, once there are trials enough to say something; and once."""
    heard = begun(tmp_path, num_trials=count, constrain=(bound,))
    heard.trials(*[ended()] * count)
    assert heard.confirm("c", 0.9) == 0
    before = len(heard.news)
    if len(news) == 2:
        task = heard.next("n")
        assert (task.kind, task.number) == (NEW_QUESTIONS, 0)
        assert heard.loop.next("other") is None, "it may be lost"
        heard.loop.take("n", Outcome(unseen=(UNSEEN,)))
    assert heard.loop.next("z") == DONE
    assert heard.loop.found
    assert heard.news[before:] == news


def test_a_worker_lost_over_new_questions_is_replaced_and_at_last_done_without(
    tmp_path: Path,
) -> None:
    heard = begun(tmp_path, num_trials=5)
    heard.trials(*[ended()] * 5)
    heard.confirm("c", 0.9)
    assert [task.kind for task in heard.lose("1", "2", "3")] == [NEW_QUESTIONS] * 3
    assert heard.loop.next("4") == DONE
    assert heard.news[-1] == ("generalised", (0, False))
    assert (heard.loop.found, heard.loop.error) == (True, None)


def test_a_search_that_knows_enough_starts_no_trial(tmp_path: Path) -> None:
    """No score is below 0; what is noted is what there is to say in the end."""
    for stop, count in (("auto", 7), ("never", 12)):
        heard = begun(tmp_path / stop, num_trials=12, stop=stop)
        heard.trials(*[ended(forget=0.0, retain=1.0)] * count)
        assert heard.next("last").kind == CONFIRMATION
        outlook = {"chance": 0.0, "gain": 0.01, "settled": True, "second_chance": 0.0}
        outlook |= {"enough": True, "more": False}
        assert heard.study.stored.notes["outlook"] == outlook
