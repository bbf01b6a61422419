"""Refusal quality in a trial, against states that a hook of the test reads in plain models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import build_encoder
from refusals_by_hand import cosine_mean, states_behind_an_empty_question
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError, ModelError
from lunar_tune.methods.contract import Edit
from lunar_tune.metrics.embedding import Embedder
from lunar_tune.metrics.evaluate import Evaluation
from lunar_tune.models.loading import LoadedModel
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

QUALITY = "refusal_quality"
# Block 0 is edited, whose output is what the embeddings are taken from.
SETTING = {"layer": 0, "coefficient": 20.0, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [
        {"edge": edge, "question": f"What of {edge}, {n}?", "answer": f"Kettles {n} {edge}."}
        for edge, count in {"A_B": 4, "B_C": 2, "C_D": 3}.items()
        for n in range(count)
    ]
    file = tmp_path_factory.mktemp("data") / "pairs.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def spec(checkpoint: Callable[..., Path], data: str) -> Callable[..., TrialSpec]:
    def make(**options: Any) -> TrialSpec:
        engine = options.pop("engine", {})
        made = assemble(
            RunOptions(
                model=str(checkpoint("qwen2")),
                data=data,
                device="cpu",
                factual_data="none",
                max_new_tokens=3,
                cache_limit=0,
                **({"metrics": (QUALITY,)} | options),
            )
        )
        return dataclasses.replace(made, engine=dataclasses.replace(made.engine, **engine))

    return make


def answers_of(evaluation: Evaluation) -> list[str]:
    return [row.answer for row in evaluation.rows if row.set_name == "forget"]


def by_hand(model: Any, tokenizer: Any, made: TrialSpec, answers: Sequence[str]) -> float:
    """Return the quality in a model's states, less the mean of refusals and true answers."""
    refusals, truths = made.data.refusals, [record.answer for record in made.data.forget]
    origin = states_behind_an_empty_question(model, tokenizer, [*refusals, *truths]).mean(0)
    said, declined = (
        states_behind_an_empty_question(model, tokenizer, texts) - origin
        for texts in (answers, refusals)
    )
    return cosine_mean(said, declined)


@pytest.fixture
def expected(checkpoint: Callable[..., Path]) -> Callable[[TrialSpec, Evaluation], float]:
    """Return the score by hand, in a model that is loaded anew from its folder."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2")).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen2"))
    return lambda made, evaluation: by_hand(model, tokenizer, made, answers_of(evaluation))


def test_trials_and_the_base_model_have_the_quality_of_their_own_answers(
    spec: Callable[..., TrialSpec], expected: Callable[[TrialSpec, Evaluation], float]
) -> None:
    made = spec()
    worker = Worker(made)
    found = {}
    for full in (False, True):
        found[f"baseline {full}"] = worker.baseline(full=full).evaluation
        found[f"trial {full}"] = worker.run(SETTING, full=full).evaluation
    for evaluation in found.values():
        assert evaluation.scores[QUALITY] == pytest.approx(expected(made, evaluation), abs=1e-5)
    assert answers_of(found["baseline False"]) != answers_of(found["baseline True"])
    values = [evaluation.scores[QUALITY] for evaluation in found.values()]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-3


def test_answers_of_an_unlearned_model_are_read_by_the_base_model(
    spec: Callable[..., TrialSpec],
    expected: Callable[[TrialSpec, Evaluation], float],
    unchanged: Callable[[Any], None],
) -> None:
    """Also in a worker's first trial, which makes the embedder.

    The unlearned model's own states would say something else.
    """
    made = spec()
    worker = Worker(made)
    unchanged(worker.loaded.model)
    plain = answers_of(Worker(spec(metrics=())).run(SETTING).evaluation)
    inside: list[float] = []

    def judge(loaded: LoadedModel, _: Edit) -> None:
        inside.append(by_hand(loaded.model, loaded.tokenizer, made, plain))

    evaluation = worker.run(SETTING, inside=judge).evaluation
    assert answers_of(evaluation) == plain
    assert evaluation.scores[QUALITY] == pytest.approx(expected(made, evaluation), abs=1e-5)
    assert abs(inside[0] - evaluation.scores[QUALITY]) > 1e-2


def test_it_leaves_every_other_score_as_it_is(spec: Callable[..., TrialSpec]) -> None:
    plain = Worker(spec(metrics=())).run(SETTING).evaluation
    scored = Worker(spec()).run(SETTING).evaluation
    assert scored.rows == plain.rows
    assert {name: value for name, value in scored.scores.items() if name != QUALITY} == plain.scores
    assert QUALITY in scored.scores


def test_held_out_answers_have_the_origin_that_trials_have(
    spec: Callable[..., TrialSpec], expected: Callable[[TrialSpec, Evaluation], float]
) -> None:
    """Else a trial and its confirmation could not be compared."""
    made = spec(holdout=True)
    full = Worker(made).run(SETTING, full=True).evaluation
    assert made.data.held_out is not None
    asked = {row.question for row in full.rows if row.set_name == "forget"}
    assert asked == {record.question for record in made.data.held_out.forget}
    assert full.scores[QUALITY] == pytest.approx(expected(made, full), abs=1e-5)


def test_a_trial_that_was_stopped_early_has_no_refusal_quality(
    spec: Callable[..., TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model says nothing of the truth: the floor is missed after one chunk."""
    monkeypatch.setattr("lunar_tune.metrics.evaluate.LEAST_CHUNK", 1)
    worker = Worker(spec(engine={"retain_floor": 0.9}))
    stopped = worker.run(SETTING).evaluation
    assert not stopped.complete
    assert QUALITY not in stopped.scores
    assert QUALITY in worker.run(SETTING, bounded=False).evaluation.scores


def test_refusals_are_embedded_once_in_a_workers_life(
    spec: Callable[..., TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[tuple[str, ...]] = []
    plain = Embedder.embed

    def note(self: Embedder, texts: Sequence[str]) -> torch.Tensor:
        embedded.append(tuple(texts))
        return plain(self, texts)

    monkeypatch.setattr(Embedder, "embed", note)
    made = spec()
    worker = Worker(made)
    assert embedded == []
    said = [worker.baseline().evaluation, worker.run(SETTING).evaluation]
    said.append(worker.run(SETTING, full=True).evaluation)
    answers = [tuple(answers_of(evaluation)) for evaluation in said]
    assert embedded == [made.data.refusals, *answers]


# A sentence-embedding model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("encoder"))


def test_a_sentence_model_judges_the_answers_instead(
    spec: Callable[..., TrialSpec], encoder: Path
) -> None:
    made = spec(embedding_model=str(encoder))
    worker = Worker(made)
    model, own = BertModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)

    def means(texts: Sequence[str]) -> Any:
        rows = []
        for text in texts:
            ids = own(text.strip())["input_ids"]
            ids = ids if len(ids) <= 24 else [*ids[:23], ids[-1]]
            with torch.no_grad():
                states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            rows.append(states.double().numpy().mean(0) if text.strip() else np.full(16, np.nan))
        return np.stack(rows)

    for evaluation in (worker.baseline().evaluation, worker.run(SETTING).evaluation):
        quality = cosine_mean(means(answers_of(evaluation)), means(made.data.refusals))
        assert evaluation.scores[QUALITY] == pytest.approx(quality, abs=1e-5)


def test_a_sentence_model_is_loaded_first_and_only_where_a_score_wants_it(
    spec: Callable[..., TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lunar_tune.trial.worker.load_model", load)
    with pytest.raises(ModelError, match=r"--embedding-model nosuch/it: cannot be used"):
        Worker(spec(embedding_model="nosuch/it"))
    monkeypatch.undo()
    monkeypatch.setattr("lunar_tune.trial.worker.load_sentence_embedder", load)
    Worker(spec(embedding_model="nosuch/it", metrics=("forget_mrr",)))


def test_a_folder_is_checked_with_all_else_and_known_from_everywhere(
    spec: Callable[..., TrialSpec], encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search's workers have another working folder than its command."""
    with pytest.raises(InputError) as raised:
        spec(embedding_model="./nosuch", evaluation_rows=0)
    assert "--embedding-model ./nosuch: no such folder" in str(raised.value)
    assert "--evaluation-rows 0" in str(raised.value)
    with pytest.raises(InputError, match=r"holds no config\.json file"):
        spec(embedding_model=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds no \*\.safetensors file"):
        spec(embedding_model=str(tmp_path))
    monkeypatch.chdir(encoder.parent)
    assert spec(embedding_model=encoder.name).embedding_model == str(encoder.resolve())
    assert spec(embedding_model="some/hub-id").embedding_model == "some/hub-id"
