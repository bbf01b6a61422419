"""Which reference prompts make the unlearning vector: those that the base model declines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from command_lines import small_run
from made_search import made_search
from scores_by_hand import prompt_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from trial_specs import generated

from lunar_tune.errors import InputError
from lunar_tune.export.export_job import assemble_again
from lunar_tune.methods.lunar.method import PreparedLunar
from lunar_tune.reference import unlearning_vector
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.trial import references as references_module
from lunar_tune.trial.references import LEAST_DECLINED, References, judge_references
from lunar_tune.trial.single import unlearn
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.tasks import BASE_MODEL, TRIAL, Task, TaskRunner
from lunar_tune.trial.worker import Worker

PROMPTS = [f"What of {thing} number {n}?" for thing in ("nothing", "nobody") for n in range(12)]
BUDGET = 5
SETTING = {"layer": 1, "coefficient": 2.0, "ridge": 0.1}
Specs = Callable[..., TrialSpec]


def declines(answer: str, _: object = ()) -> bool:
    """Decline by chance: a random model's answers have no words."""
    return sum(answer.encode()) % 3 == 0


@pytest.fixture(autouse=True)
def _declining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references_module, "declines", declines)
    monkeypatch.setattr(references_module, "ANSWER_TOKENS", BUDGET)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("references") / "prompts.json"
    file.write_text(json.dumps(PROMPTS), encoding="utf-8")
    return str(file)


@pytest.fixture
def made(spec: Specs, prompts: str) -> Callable[..., TrialSpec]:
    """Return a factory of specs with all prompts, of which the base model declines some."""

    def make(**options: Any) -> TrialSpec:
        own = {"solver": "closed_form", "reference_check": "declined"} | options
        one = spec(reference_prompts=prompts, **own)
        return dataclasses.replace(
            one, data=dataclasses.replace(one.data, reference_prompts=tuple(PROMPTS))
        )

    return make


def declined_by_hand(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    answers = generated(folder, model, PROMPTS, budget=BUDGET)
    return [row for row, answer in enumerate(answers) if declines(answer)]


def test_the_vector_is_that_of_the_prompts_which_generate_answers_by_declining(
    made: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = made()
    folder, model = Path(spec.model.source), AutoModelForCausalLM.from_pretrained(spec.model.source)
    declined = declined_by_hand(folder)
    assert LEAST_DECLINED < len(declined) < len(PROMPTS) - 3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    forget = [prompt_of(tokenizer, one.question) for one in spec.data.forget]
    used = {"declined": [PROMPTS[row] for row in declined], "report": PROMPTS, "never": PROMPTS}
    for check, texts in used.items():
        if check == "never":
            monkeypatch.setattr("lunar_tune.trial.worker.ask_references", None)
        worker = Worker(made(reference_check=check))
        reference = [prompt_of(tokenizer, text) for text in texts]
        assert isinstance(worker.prepared, PreparedLunar)
        for layer in range(3):
            expected = unlearning_vector(model, layer, reference, forget).double()
            assert torch.allclose(worker.prepared.vectors[layer], expected, rtol=0, atol=1e-5)
        found = worker.references
        assert (found is None) is (check == "never")
        if found is not None:
            assert (found.asked, list(found.declined)) == (len(PROMPTS), declined)
            assert [prompt for prompt, _ in found.declining] == [PROMPTS[i] for i in declined[:3]]
            assert all(not declines(answer) for _, answer in found.answering)
    assert Worker(made(method="ga", solver=None)).references is None, "it has no use for them"


def test_what_a_worker_is_told_it_does_not_ask(
    made: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TaskRunner(made(text=False)).run(Task(kind=BASE_MODEL))
    assert first.references is not None
    assert (first.references.declining, first.references.answering) == ((), ()), "--no-text"
    note = json.loads(json.dumps(dataclasses.asdict(first.references)))
    known = References.read(note)
    assert known == first.references
    monkeypatch.setattr(references_module, "declines", None)
    task = Task(kind=TRIAL, number=0, parameters=SETTING, known_references=known)
    later = TaskRunner(made()).run(task)
    assert later.result is not None
    chosen = made(reference_check="never")
    data = dataclasses.replace(
        chosen.data, reference_prompts=tuple(PROMPTS[row] for row in known.declined)
    )
    by_hand = Worker(dataclasses.replace(chosen, data=data)).run(SETTING)
    assert later.result.evaluation.rows == by_hand.evaluation.rows
    with pytest.raises(InputError, match="note of reference prompts: declined"):
        References.read(note | {"declined": ["x"]})


def test_too_few_end_a_run_before_the_first_trial_and_say_what_to_do(
    made: Specs, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(declined: int, asked: int) -> str | None:
        return References(asked=asked, declined=tuple(range(declined))).problem("declined")

    assert [found(*counts) for counts in ((10, 200), (59, 66), (7, 7), (1, 1))] == [None] * 4
    for counts in ((9, 200), (0, 200), (0, 3), (6, 7)):
        said = found(*counts)
        assert said is not None
        assert said.startswith(f"{counts[0] or 'none'} of {counts[1]} reference prompts are decl")
        assert References(asked=counts[1], declined=()).problem("report") is None
    few, none = References(asked=66, declined=(0, 3)), References(asked=66, declined=())
    judge_references(few, "declined", forced=True)
    for one, forced in ((few, False), (few, None), (none, True)):
        with pytest.raises(InputError) as caught:
            judge_references(one, "declined", forced=forced)
        assert ("--force skips" in str(caught.value)) is (forced is False)
    monkeypatch.setattr(references_module, "declines", lambda *_: False)
    run = small_run(checkpoint("qwen2"), tmp_path, solver="closed_form", reference_check="declined")
    with pytest.raises(InputError, match="none of 2 reference prompts") as caught:
        unlearn(run, SETTING)
    for part in ("It answers, for example: What is nowhere? -> ", "--reference-check report"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match=r"none of 2 reference prompts") as caught:
        unlearn(dataclasses.replace(run, text=False), SETTING)
    assert "nowhere" not in str(caught.value)
    reported = unlearn(dataclasses.replace(run, reference_check="report"), SETTING)
    assert reported.document()["reference_prompts"]["declined"] == ()
    outcome = TaskRunner(made()).run(Task(kind=BASE_MODEL, layer_coefficient=2.0))
    assert (outcome.failure, outcome.layer_prior) == (None, None), "it is the search's to judge"


def test_a_search_keeps_which_prompts_it_used_and_its_export_uses_them(
    checkpoint: Callable[..., Path],
    prompts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = small_run(
        model := checkpoint("qwen2"),
        tmp_path,
        solver="closed_form",
        reference_check="declined",
        reference_prompts=prompts,
    )
    search = StoredSearch.read(made_search(tmp_path, "found", options, SETTING))
    found, notes, count = search.study.references, search.study.notes, len(PROMPTS)
    assert found is not None
    assert list(found.declined) == declined_by_hand(model)
    summary = f"{len(found.declined)} of {count} are declined and used"
    assert notes["facts"]["reference prompts"] == summary
    assert notes["description"]["parameters"]["reference_prompts"].startswith(f"{summary}, SHA-256")
    asked = Mock(side_effect=AssertionError("it is known"))
    monkeypatch.setattr(references_module, "declines", asked)
    spec = assemble_again(search, problems := Mock(messages=[]))
    assert problems.messages == []
    again = Worker(spec).run(SETTING, full=True)
    answers = {row.question: row.answer for row in search.answer_rows(0, full=True)}
    assert {row.question: row.answer for row in again.evaluation.rows} == answers
    kept = search.study.references
    assert kept is not None
    assert Worker(spec).reference_prompts == tuple(PROMPTS[row] for row in kept.declined)
