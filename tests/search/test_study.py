"""The study: what it is told is what it says, also when opened again; damage; importance."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_outcomes import complete, trial_result
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState
from pages_by_hand import said
from tracked_searches import SPACE

from lunar_tune.config.options import SearchConfig
from lunar_tune.driver.samplers import SAMPLERS, open_study
from lunar_tune.driver.space import SearchSpace
from lunar_tune.errors import InputError
from lunar_tune.models.catalog import LINEAGE_FILE, read_lineage
from lunar_tune.study.folder import Folder, read_answers, write_answers, write_trials
from lunar_tune.study.rows import (
    COMPLETE,
    FAILED,
    LEAST_TRIALS,
    RUNNING,
    TrialRow,
    best_first,
    parameter_importance,
)
from lunar_tune.study.study import INTERRUPTED, LEFT_RUNNING, StoredStudy, Study

BOUND = "retain_rouge1>=0.8"
GOAL = ("forget_rouge1", (BOUND,))
POINTS = SPACE.starting_points
UNSTARTED = dataclasses.replace(SPACE, starting_points=())


def study_in(folder: Path, *, space: SearchSpace = SPACE, **options: Any) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    return open_study(Folder(folder), space, SearchConfig(**options))


def optuna_study(folder: Path) -> optuna.Study:
    """Open the journal without the class under test."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name=folder.name, storage=storage)


def frozen(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna_study(folder).get_trials()


def landscape(parameters: dict[str, Any]) -> dict[str, Any]:
    moved = parameters["coefficient"] / 8 * (1 + parameters["layer"]) / 4
    return trial_result(forget=1 - moved, retain=1 - moved / 2)


def run_trials(study: Study, *scores: tuple[float, float]) -> None:
    for forget, retain in scores:
        complete(study, study.ask()[0], trial_result(forget, retain))


def stored_in(folder: Path) -> StoredStudy:
    return StoredStudy.read(folder / "study.journal")


def cut_after(folder: Path, text: bytes, *, n_before: int) -> None:
    """Cut a journal after its first later line with a text, as a kill does."""
    path = folder / "study.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if i >= n_before and text in line)
    path.write_bytes(b"".join(lines[: last + 1]))


def test_a_trial_is_running_until_it_is_told_and_says_once_how_it_ended(tmp_path: Path) -> None:
    assert StoredStudy.read(tmp_path / "study.journal") == StoredStudy()
    study = study_in(tmp_path)
    assert study.rows() == [], "a starting point that waits is no row"
    assert study.ask() == (0, POINTS[0])
    row = study.row(0)
    assert study.running() == [0]
    assert (row.state, row.parameters, row.scores, row.feasible) == (RUNNING, POINTS[0], {}, None)

    complete(study, 0, trial_result(0.2, 0.9))
    study.fail(0, "too late")
    row = study.row(0)
    assert study.running() == []
    assert (row.state, row.feasible, row.failure) == (COMPLETE, True, None)
    assert row.scores == trial_result(0.2, 0.9).evaluation.scores
    assert (row.losses, row.seconds["trial"]) == ((2.0, 1.0), 0.75)
    assert row.seconds["suggest"] >= 0
    assert (row.retain_rows, row.retain_exact, row.max_new_tokens) == (84, True, 32)
    assert row.answers_digest == "ab"

    study.ask()
    study.fail(1, "the loss became NaN")
    study.fail(1, "something later")
    assert (study.row(1).state, study.row(1).failure) == (FAILED, "the loss became NaN")


def test_a_journal_says_what_the_study_says_to_whoever_opens_it(tmp_path: Path) -> None:
    """Also where the folder was renamed; what was left running failed, and runs first."""
    study = study_in(tmp_path)
    run_trials(study, (0.5, 0.9), (0.1, 0.5), (0.3, 0.85))
    study.fail(study.ask()[0], "diverged")
    study.note("goal", GOAL)
    study.note("baseline", {"retain_rouge1": 1.0})
    number, parameters = study.ask()
    stored = stored_in(tmp_path)
    assert list(stored.rows) == study.rows()
    assert stored.notes["baseline"] == {"retain_rouge1": 1.0}

    renamed = Folder(tmp_path)
    renamed.name = "renamed"
    again = open_study(renamed, SPACE, SearchConfig())
    assert again.rows()[:4] == study.rows()[:4]
    assert [row.number for row in best_first(again.rows())] == [2, 0]
    assert (again.row(number).state, again.row(number).failure) == (FAILED, LEFT_RUNNING)
    assert len(again.ended) == 4
    assert again.ask() == (number + 1, parameters)
    _, fresh = again.ask()
    assert fresh not in [row.parameters for row in again.rows()[:-1]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_decides_what_a_sampler_proposes_in_the_space(tmp_path: Path, sampler: str) -> None:
    """Nine trials: the model-based samplers propose the last one themselves."""

    def suggestions(name: str, seed: int) -> list[dict[str, Any]]:
        study = study_in(tmp_path / name, seed=seed, sampler=sampler, space=UNSTARTED)
        for _ in range(9):
            number, parameters = study.ask()
            SPACE.check(parameters)
            complete(study, number, landscape(parameters))
        return [row.parameters for row in study.rows()]

    first = suggestions("first", 1)
    assert suggestions("second", 1) == first
    assert suggestions("other", 2) != first
    assert all(trial.constraints for trial in frozen(tmp_path / "first"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_search_is_proposed_what_it_would_have_been(tmp_path: Path, sampler: str) -> None:
    """Stopped between trials, and in the middle of one."""
    options: dict[str, Any] = {"seed": 3, "sampler": sampler, "space": UNSTARTED}
    whole, part = (study_in(tmp_path / name, **options) for name in ("whole", "part"))
    expected = []
    for _ in range(11):
        number, parameters = whole.ask()
        expected.append(parameters)
        complete(whole, number, landscape(parameters))
    for stop in range(11):
        if stop in (2, 9):
            part.ask()  # and is killed
        if stop in (2, 5, 9):
            part = study_in(tmp_path / "part", **options)
        number, parameters = part.ask()
        complete(part, number, landscape(parameters))
    found = [row.parameters for row in part.rows() if row.state == COMPLETE]
    assert found == expected


def test_feasible_is_a_constraint_of_at_most_zero(tmp_path: Path) -> None:
    retained = {0.8: True, 0.9: True, math.nextafter(0.8, 0): False, 0.0: False}
    study = study_in(tmp_path, sampler="random")
    run_trials(study, *((0.5, retain) for retain in retained))
    for retain, trial, row in zip(retained, frozen(tmp_path), study.rows(), strict=True):
        assert dict(trial.constraints) == {BOUND: 0.8 - retain}
        assert (trial.constraints[BOUND] <= 0) is retained[retain] is row.feasible
    assert [row.number for row in best_first(study.rows())] == [1, 0]


def test_scores_that_are_not_finite_or_not_there_fail_the_trial(tmp_path: Path) -> None:
    study = study_in(tmp_path, sampler="random")
    run_trials(study, (math.nan, 0.9), (0.1, math.nan), (math.inf, 0.9))
    assert study.running() == []
    for row, told in zip(study.rows(), frozen(tmp_path), strict=True):
        assert (row.state, row.failure) == (FAILED, "a score is not a finite number")
        assert (row.scores, row.feasible) == ({}, None)
        assert (told.state, told.value) == (TrialState.COMPLETE, 1.0), "the sampler learns from it"
        assert told.constraints == {BOUND: 0.8}
    study = study_in(tmp_path / "other", constrain=("retain_perplexity<=3",))
    run_trials(study, (0.1, 0.9))
    assert study.row(0).state == FAILED
    (told,) = frozen(tmp_path / "other")
    assert told.state == TrialState.FAIL, "of a score that is not there no worst value is known"


def test_a_setting_that_fails_by_its_nature_is_told_as_the_worst_that_can_be(
    tmp_path: Path,
) -> None:
    for bound, objective, value, violation in (
        # The worst that ROUGE can be, whatever was seen.
        (BOUND, "forget_rouge1", 1.0, 0.8),
        # Maximised: its least value, with the sign of what Optuna minimises.
        ("forget_rouge1<=0.25", "retain_rouge1", 0.0, 0.75),
        # A perplexity has no end: the highest that was seen.
        ("retain_perplexity<=3", "forget_rouge1", 1.0, 4.5),
    ):
        study = study_in(tmp_path / bound, constrain=(bound,), minimise=objective)
        complete(study, study.ask()[0], trial_result(0.1, 0.9, retain_perplexity=7.5))
        study.ask()
        study.fail(1, "the loss became NaN", deterministic=True)
        told, row = frozen(tmp_path / bound)[1], study.row(1)
        assert (told.state, told.value) == (TrialState.COMPLETE, value)
        assert dict(told.constraints) == {bound: violation}
        assert (row.state, row.failure, row.again) == (FAILED, "the loss became NaN", False)
        assert (row.scores, row.feasible, row.objective, len(study.ended)) == ({}, None, None, 2)


@pytest.mark.parametrize(("reason", "attempts"), [("the worker was killed", 2), (INTERRUPTED, 1)])
def test_a_trial_that_was_nobodys_fault_runs_again_under_another_number(
    tmp_path: Path, reason: str, attempts: int
) -> None:
    """An interruption is no attempt."""
    study = study_in(tmp_path)
    number, parameters = study.ask()
    assert study.attempts(number) == 1
    study.fail(number, reason, again=True)
    again = study_in(tmp_path)
    assert (again.row(0).failure, again.row(0).again, len(again.ended)) == (reason, True, 0)
    assert again.ask() == (1, parameters)
    assert again.attempts(1) == attempts
    complete(again, 1, trial_result(0.2, 0.9))
    assert (again.row(1).again, len(again.ended)) == (False, 1)


def test_a_kill_in_the_middle_of_failing_counts_a_trial_once_and_runs_it_once_more(
    tmp_path: Path,
) -> None:
    failures: list[tuple[str, bytes]] = [
        # The journal has the queued setting, and the trial that it repeats still running.
        ("again", b"again_of"),
        # It has the reason of a trial that is still running.
        ("deterministic", b"NaN"),
    ]
    for how, last in failures:
        folder = tmp_path / how
        study = study_in(folder)
        _, parameters = study.ask()
        before = (folder / "study.journal").read_bytes().count(b"\n")
        study.fail(0, "NaN", **{how: True})
        cut_after(folder, last, n_before=before)
        again = study_in(folder)
        assert [one.state for one in frozen(folder)] == [TrialState.FAIL, TrialState.WAITING]
        assert (len(again.ended), again.row(0).again) == (0, True)
        assert again.ask() == (1, parameters)


def test_a_starting_point_that_was_being_suggested_or_queued_is_not_lost(tmp_path: Path) -> None:
    """Killed before its first parameter was drawn, or before the last point was queued."""
    study_in(tmp_path)
    optuna_study(tmp_path).ask()
    assert study_in(tmp_path).ask() == (1, POINTS[0])
    other = tmp_path / "other"
    points = tuple({**POINTS[0], "coefficient": float(c)} for c in (1, 2, 3))
    space = dataclasses.replace(SPACE, starting_points=points)
    study_in(other, space=space)
    cut_after(other, b"fixed_params", n_before=0)
    again = study_in(other, space=space)
    assert [again.ask()[1] for _ in points] == list(points)


# Other goals


def test_what_is_better_when_higher_is_maximised_under_several_bounds(tmp_path: Path) -> None:
    bounds = ("forget_rouge1<=0.3", "retain_mrr>=0.5")
    study = study_in(tmp_path, minimise="retain_rouge1", constrain=bounds)
    for forget, retain, mrr in ((0.2, 0.9, 0.6), (0.2, 0.95, 0.4), (0.1, 0.7, 0.9)):
        complete(study, study.ask()[0], trial_result(forget, retain, retain_mrr=mrr))
    trials = frozen(tmp_path)
    assert [trial.value for trial in trials] == [-0.9, -0.95, -0.7]
    assert [row.feasible for row in study.rows()] == [True, False, True]
    assert [row.number for row in best_first(study.rows())] == [0, 2]
    for trial in trials:
        assert set(trial.constraints) == set(bounds)


# Going on


def test_a_study_that_was_killed_as_it_was_made_is_made_whole(tmp_path: Path) -> None:
    study_in(tmp_path)
    cut_after(tmp_path, b"", n_before=0)
    assert stored_in(tmp_path).notes == {}
    assert study_in(tmp_path).ask() == (0, POINTS[0])
    assert "format" in stored_in(tmp_path).notes


def test_a_torn_last_line_is_cut_and_all_before_it_is_kept(tmp_path: Path) -> None:
    """Whoever only reads leaves it, and everything else, as it was."""
    study = study_in(tmp_path)
    run_trials(study, (0.5, 0.9))
    study.note("goal", GOAL)
    (tmp_path / ".study.journal.lock").unlink(missing_ok=True)
    path = tmp_path / "study.journal"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1][:-9])

    def everything() -> list[tuple[str, int, int]]:
        files = sorted(tmp_path.iterdir())
        return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    before = everything()
    assert list(stored_in(tmp_path).rows) == study.rows()
    assert everything() == before
    again = study_in(tmp_path)
    assert path.read_bytes().startswith(whole + b"{")
    assert [row.scores for row in again.rows()] == [study.row(0).scores]


def test_a_disk_that_is_full_for_one_line_only_costs_that_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same process writes on, as it does when a trial has ended or the search is stopped."""
    study = study_in(tmp_path)
    run_trials(study, (0.5, 0.9), (0.4, 0.9))
    number, parameters = study.ask()

    class Full(io.FileIO):
        def write(self, line: Any) -> int:
            super().write(line[: len(line) // 2])
            raise OSError(28, "No space left on device")

    def opened(path: str, mode: str) -> Any:
        return Full(path, "a") if "a" in mode else Path(path).open(mode)

    with monkeypatch.context() as full:
        full.setattr("optuna.storages.journal._file.open", opened, raising=False)
        with pytest.raises(OSError, match="No space left"):
            complete(study, number, landscape(parameters))
    assert not (tmp_path / "study.journal").read_bytes().endswith(b"\n")
    study.fail(number, INTERRUPTED, again=True)
    assert [row.state for row in study.rows()] == [COMPLETE, COMPLETE, FAILED]
    again = study_in(tmp_path)
    assert [row.scores for row in again.rows()] == [row.scores for row in study.rows()]
    assert again.ask() == (3, parameters)


# Damaged files: refused in one message, never a traceback

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the lines of a journal with a completed, a failed and a running trial."""
    folder = tmp_path_factory.mktemp("study")
    study = study_in(folder, sampler="random")
    study.note("goal", GOAL)
    run_trials(study, (0.1, 0.9))
    study.fail(study.ask()[0], "diverged")
    study.ask()
    return [json.loads(line) for line in (folder / "study.journal").read_text().splitlines()]


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_changed_journal_is_read_or_refused(
    journal: list[dict[str, Any]], data: st.DataObject
) -> None:
    lines = [dict(line) for line in journal]
    line = data.draw(st.sampled_from(lines))
    line[data.draw(st.sampled_from(list(line)))] = data.draw(JSON)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "study.journal"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            StoredStudy.read(path)
        except InputError as error:
            assert folder in str(error)  # noqa: PT017 the other outcome is as good


def test_a_journal_of_pickles_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "study.journal"
    path.write_bytes(pickle.dumps(Touch()) + b"\n")
    with pytest.raises(InputError, match="is damaged, or not the journal of a search"):
        StoredStudy.read(path)
    assert not (tmp_path / "ran").exists()


def test_damaged_answers_are_refused(tmp_path: Path) -> None:
    path, row = tmp_path / "00000.parquet", said("forget", "?", ".", 0.5)
    write_answers(path, [row], [1.0])
    assert read_answers(path) == [row]
    for content in (b"", path.read_bytes()[:-9]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is damaged, or holds no answers"):
            read_answers(path)


def test_answers_that_stand_for_gigabytes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunar_tune.study.folder._MEMORY", 2**26)
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), ["x" * 900_000])
    pq.write_table(pa.table({"answer": same}), path := tmp_path / "00000.parquet")
    assert path.stat().st_size < 200_000
    with pytest.raises(InputError, match="it takes more than 64 MiB of memory"):
        read_answers(path)


@given(content=JSON)
@settings(deadline=None)
@example(content={"knowledge": {"rouge1": "high"}})
@example(content={"settings": []})
@example(content={"unlearned": {"data": "mini"}})
def test_a_changed_lineage_is_read_or_refused(content: Any) -> None:
    whole = {"format": 1, "base": "b", "source": "s", "weights": None, "revision": None}
    whole |= {"fingerprint": "f", "data": "d", "data_digest": "e", "settings": {}}
    with TemporaryDirectory() as folder:
        changed = whole | content if isinstance(content, dict) else content
        (Path(folder) / LINEAGE_FILE).write_text(json.dumps(changed))
        try:
            lineage = read_lineage(folder)
        except InputError as error:
            assert folder in str(error)  # noqa: PT017 the other outcome is as good
        else:
            assert lineage.summary


# Importance

KINDS = {
    **SPACE.parameters,
    "ridge": CategoricalDistribution((0.01, 0.1, 1.0)),
    "fixed": IntDistribution(3, 3),
}
DECIDES: dict[str, Callable[[dict[str, Any]], float]] = {
    "layer": lambda point: point["layer"] / 3,
    "coefficient": lambda point: point["coefficient"] / 8,
    "learning_rate": lambda point: -math.log10(point["learning_rate"]) / 4,
    "ridge": lambda point: float(point["ridge"] == 0.1),
}


def scored(score: Callable[[dict[str, Any]], float]) -> list[TrialRow]:
    draw, rows = random.Random(1), []
    for number in range(40):
        point = {
            "layer": draw.randint(0, 3),
            "coefficient": draw.uniform(0.5, 8.0),
            "learning_rate": 10 ** draw.uniform(-4, -1.6),
            "ridge": draw.choice((0.01, 0.1, 1.0)),
            "fixed": 3,
        }
        scores = {"forget_rouge1": score(point)}
        rows.append(TrialRow(number=number, state=COMPLETE, parameters=point, scores=scores))
    return rows


@pytest.mark.parametrize("name", DECIDES)
def test_a_parameter_that_alone_decides_has_most_of_the_importance(name: str) -> None:
    rows = scored(DECIDES[name])
    shares, again = (parameter_importance(rows, KINDS, "forget_rouge1") for _ in range(2))
    assert shares == again
    assert next(iter(shares)) == name
    assert shares[name] > 0.8
    assert set(shares) == set(DECIDES), "what has one value alone has no part"
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert sum(shares.values()) <= 1 + 1e-9


def test_there_is_none_where_trials_tell_nothing() -> None:
    rows, equal = scored(DECIDES["layer"]), scored(lambda _: 0.5)
    for told in (rows[: LEAST_TRIALS - 1], equal):
        assert parameter_importance(told, KINDS, "forget_rouge1") is None
    assert parameter_importance(rows, KINDS, "forget_mrr") is None
    assert parameter_importance(rows, {"fixed": KINDS["fixed"]}, "forget_rouge1") is None


def damaged(lines: list[bytes], old: bytes, new: bytes) -> list[bytes]:
    assert any(old in line for line in lines)
    return [line.replace(old, new) for line in lines]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: damaged(lines, b'"values":[0.5]', b'"values":[NaN]'), "not a finite number"),
        (lambda lines: damaged(lines, b'"forget_rouge1":0.5', b'"forget_rouge1":NaN'), "finite"),
        (lambda lines: damaged(lines, b'"values":[0.5]', b'"values":[0.25]'), "its objective is"),
        (lambda lines: damaged(lines, b'_internal":2.0', b'_internal":9.0'), "outside 0.5 … 8.0"),
        (lambda lines: [*lines, *lines], "it says the same twice"),
        (lambda lines: lines[:-12], "answers of 1 trials .the first is 1. that the journal does"),
        (lambda lines: damaged(lines, b'"ab"', b'"cd"'), "answers of 2 trials .the first is 0."),
    ],
)
def test_what_no_search_has_written_is_said(
    change: Callable[[list[bytes]], list[bytes]], said: str, tmp_path: Path
) -> None:
    study = study_in(tmp_path)
    study.note("goal", GOAL)
    run_trials(study, (0.5, 0.9), (0.25, 0.85))
    write_trials(Folder(tmp_path).trials, study.rows())
    path = Folder(tmp_path).journal
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(stored_in(tmp_path).rows) == 2
    path.write_bytes(b"".join(change(lines)))
    for read in (lambda: stored_in(tmp_path), lambda: study_in(tmp_path)):
        with pytest.raises(InputError, match=said) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: is damaged, or not the journal of a search (")
