"""Scores beside ROUGE in a trial: likelihoods row by row, refusal quality in plain states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from scores_by_hand import likelihood_alone, prompt_of, states_behind, unit

from lunar_tune.config.options import LEAST_BUDGET
from lunar_tune.errors import ModelError
from lunar_tune.methods.contract import Edit
from lunar_tune.metrics.embedding import Refusals, load_sentence_embedder
from lunar_tune.metrics.evaluate import AnswerRow, Evaluation
from lunar_tune.metrics.goal import ANSWERS, METRICS, VERDICTS, Metric
from lunar_tune.metrics.likelihood import likelihood_means
from lunar_tune.metrics.means import mean
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training.answer_loss import Pair
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker

Specs = Callable[..., TrialSpec]
END = 2
QUALITY = "refusal_quality"
LIKELIHOODS = ("forget_log_prob", "retain_mrr", "retain_perplexity")
# Block 0 is edited, whose output is what the embeddings are taken from.
SETTING = {"layer": 0, "coefficient": 20.0, "learning_rate": 0.01}


def answers_of(evaluation: Evaluation) -> list[str]:
    return [row.answer for row in evaluation.rows if row.set_name == "forget"]


def likelihoods_alone(loaded: LoadedModel, spec: TrialSpec, *, full: bool) -> dict[str, float]:
    """Return the scores of a model, each prompt and answer encoded and judged alone."""
    scores, encode = {}, partial(loaded.tokenizer.encode, add_special_tokens=False)
    for name in ("forget", "retain"):
        pairs = [
            Pair(tuple(prompt_of(loaded.tokenizer, one.question)), (*encode(one.answer), END))
            for one in spec.data.asked(full=full)[name]
        ]
        means = likelihood_means([likelihood_alone(loaded.model, pair) for pair in pairs])
        scores |= {f"{name}_{quantity}": value for quantity, value in means.items()}
    return {name: scores[name] for name in LIKELIHOODS}


def quality_by_hand(loaded: LoadedModel, spec: TrialSpec, evaluation: Evaluation) -> float:
    """Return the quality in a model's states, less the mean of refusals and true answers."""
    refusals, truths = spec.data.refusals, [record.answer for record in spec.data.forget]
    some = (answers_of(evaluation), refusals, [*refusals, *truths])
    said, declined, centre = (states_behind(loaded.model, loaded.tokenizer, one) for one in some)
    origin = centre.mean(0)
    return float((unit(said - origin) @ unit(declined - origin).T).mean())


class Scored:
    """A worker's first trial and all that it was then asked."""

    def __init__(self, spec: TrialSpec, plain: Evaluation) -> None:
        self.spec, self.plain = spec, plain
        self.worker = worker = Worker(spec)
        self.trial = worker.run(SETTING, inside=self._judge).evaluation
        self.full_trial = worker.run(SETTING, full=True).evaluation
        self.base = worker.baseline().evaluation
        self.full_base = worker.baseline(full=True).evaluation
        self.all = (self.trial, self.full_trial, self.base, self.full_base)

    def _judge(self, loaded: LoadedModel, _: Edit) -> None:
        self.inside = likelihoods_alone(loaded, self.spec, full=False)
        self.own_quality = quality_by_hand(loaded, self.spec, self.plain)


@pytest.fixture(scope="module")
def scored(spec: Specs) -> Scored:
    plain = Worker(spec(retain_rows=4)).run(SETTING).evaluation
    return Scored(spec(metrics=(*LIKELIHOODS, QUALITY), retain_rows=4), plain)


def test_a_trial_reports_likelihoods_and_all_else_as_without(scored: Scored) -> None:
    found = {name: scored.trial.scores[name] for name in LIKELIHOODS}
    assert found == pytest.approx(scored.inside, rel=1e-4)
    assert abs(found["forget_log_prob"] - scored.base.scores["forget_log_prob"]) > 0.1
    for full, evaluation in ((False, scored.base), (True, scored.full_base)):
        alone = likelihoods_alone(scored.worker.loaded, scored.spec, full=full)
        assert {name: evaluation.scores[name] for name in alone} == pytest.approx(alone, rel=1e-4)
    assert scored.trial.rows == scored.plain.rows
    names = {*LIKELIHOODS, QUALITY, "forget_log_prob_se", "retain_mrr_se"}
    own = {name: scored.trial.scores[name] for name in names}
    assert scored.trial.scores == scored.plain.scores | own


def test_answers_are_read_by_the_base_model_and_held_out_ones_from_the_same_origin(
    spec: Specs, scored: Scored, loaded: Callable[..., LoadedModel]
) -> None:
    base = loaded("qwen2")
    values = [evaluation.scores[QUALITY] for evaluation in scored.all]
    expected = [quality_by_hand(base, scored.spec, evaluation) for evaluation in scored.all]
    assert values == pytest.approx(expected, abs=1e-5)
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-3
    assert abs(scored.own_quality - scored.trial.scores[QUALITY]) > 1e-2
    made = spec(metrics=(QUALITY,), holdout=True)
    full = Worker(made).run(SETTING, full=True).evaluation
    assert made.data.held_out is not None
    asked = {row.question for row in full.rows if row.set_name == "forget"}
    assert asked == {record.question for record in made.data.held_out.forget}
    assert full.scores[QUALITY] == pytest.approx(quality_by_hand(base, made, full), abs=1e-5)


def test_a_stopped_trial_has_only_the_forget_sets_verdicts_more(
    spec: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model says nothing of the truth: the floor is missed after one chunk."""
    monkeypatch.setattr("lunar_tune.metrics.evaluate.LEAST_CHUNK", 1)
    further = {"forget_mrr", QUALITY, "retain_refused"}
    metrics = (*further, "forget_refused")
    worker = Worker(spec(metrics=metrics, changed={"retain_floor": 0.9}))
    stopped = worker.run(SETTING).evaluation
    assert not stopped.complete
    assert not further & set(stopped.scores)
    whole = worker.run(SETTING, bounded=False).evaluation
    assert whole.complete
    assert further <= set(whole.scores)
    assert stopped.scores["forget_refused"] == whole.scores["forget_refused"]


def test_the_base_model_judges_what_was_said_on_to_128_tokens_where_verdicts_are_wanted(
    spec: Specs, loaded: Callable[..., LoadedModel]
) -> None:
    made = spec(metrics=("forget_refused",), max_new_tokens=None)
    base, worker = loaded("qwen2"), Worker(made)
    evaluation = worker.run(SETTING).evaluation
    for row in evaluation.rows:
        prompt = tuple(prompt_of(base.tokenizer, row.question))
        tokens = evaluation.tokens[worker.activations.rows_of([prompt])[0]]
        if row.set_name != "forget":
            assert len(tokens) <= LEAST_BUDGET
            assert (row.typicality, row.refused, row.degenerate) == (None, None, None)
            continue
        assert row.ended is (len(tokens) < 128)
        alone = likelihood_alone(base.model, Pair(prompt, (*tokens, *[END] * row.ended)))
        assert row.typicality == pytest.approx(alone.typicality, abs=1e-4)
    assert evaluation.scores["forget_degenerate"] == 1.0
    reported = worker.baseline(reported=True).evaluation
    assert None not in [row.refused for row in reported.rows]
    assert {"retain_refused", "retain_degenerate"} <= set(reported.scores)


def test_what_the_base_model_declines_is_read_in_longer_answers_than_its_scores_and_drafts_have(
    spec: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's metric reads the verdicts, too."""
    made = Worker(spec(max_new_tokens=None))
    short = made.baseline().evaluation
    said = {row.answer for row in short.rows}  # a random model ends no answer

    def judged(row: AnswerRow, typicality: float, _: object) -> AnswerRow:
        refused = row.answer not in said
        return replace(row, typicality=typicality, refused=refused, degenerate=False)

    metric = Metric(
        name="retain_told",
        sets=("retain",),
        low=0.0,
        high=1.0,
        lower_is_better=True,
        needs=frozenset({ANSWERS, VERDICTS}),
        compute=lambda rows: mean([float(row.refused or False) for row in rows]),
    )
    monkeypatch.setitem(METRICS._own, metric.name, metric)
    monkeypatch.setattr("lunar_tune.trial.evaluator.judged_row", judged)
    reported = made.baseline(reported=True).evaluation
    assert reported.tokens == short.tokens
    assert [row.answer for row in reported.rows] == [row.answer for row in short.rows]
    assert {name: reported.scores[name] for name in short.scores} == short.scores
    assert all(row.refused for row in reported.rows)
    assert reported.scores["forget_refused"] == 1.0
    of_user = spec(metrics=(metric.name,), max_new_tokens=LEAST_BUDGET)
    given = Worker(of_user).baseline(reported=True).evaluation
    assert given.scores["forget_refused"] == given.scores[metric.name] == 0.0
    read = Worker(replace(of_user, max_new_tokens=None)).baseline().evaluation
    assert read.scores[metric.name] == 1.0


def test_a_sentence_model_judges_the_answers_instead_and_is_loaded_first(
    spec: Specs, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is known from everywhere: a search's workers have another working folder."""
    monkeypatch.chdir(encoder.parent)
    made = spec(metrics=(QUALITY,), embedding_model=encoder.name)
    assert made.embedding_model == str(encoder.resolve())
    refusals = Refusals(load_sentence_embedder(str(encoder), device="cpu"), made.data.refusals)
    evaluation = Worker(made).run(SETTING).evaluation
    quality = refusals.quality(answers_of(evaluation))
    assert evaluation.scores[QUALITY] == pytest.approx(quality, abs=1e-9)
    monkeypatch.setattr("lunar_tune.trial.worker.load_model", pytest.fail)
    with pytest.raises(ModelError, match=r"--embedding-model nosuch/it: cannot be used"):
        Worker(spec(metrics=(QUALITY,), embedding_model="nosuch/it"))
