"""Options to a spec, and the same run on every suitable family."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lunar_tune.config.run_options import RunOptions
from lunar_tune.data.records import Record
from lunar_tune.errors import InputError, ModelError, TrialError
from lunar_tune.methods.contract import Edit
from lunar_tune.methods.lunar import LunarMethod
from lunar_tune.metrics.rouge import rouge_recall
from lunar_tune.models.chat import encode_prompts
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.loading import LoadedModel
from lunar_tune.trial.assemble import assemble, check_machine, known_depth, materialise
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import Worker


def write_records(file: Path, edges: dict[str, int], *, answer: str = "Kettles {}.") -> str:
    rows = [
        {"edge": edge, "question": f"What of {edge}, {n}?", "answer": answer.format(n)}
        for edge, count in edges.items()
        for n in range(count)
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_records(tmp_path / "pairs.json", {"A_B": 3, "B_C": 4, "C_D": 6})


# Assembling


def test_without_options_a_run_is_tiny_on_mini_with_the_default_edge() -> None:
    spec = assemble(RunOptions())
    assert (spec.model.name, spec.model.source) == ("tiny", "tiny")
    assert (spec.data.name, spec.data.forget_edges) == ("mini", ("A_B",))
    assert {record.edge for record in spec.data.forget} == {"A_B"}
    assert "A_B" not in {record.edge for record in spec.data.retain}
    assert spec.data.retain == spec.data.fit_retain == spec.data.retain_sample
    assert spec.data.factual
    assert spec.data.reference_prompts
    sent = pickle.loads(pickle.dumps(spec))
    assert isinstance(sent.method, LunarMethod)
    assert (sent.data, sent.model, sent.chat) == (spec.data, spec.model, spec.chat)


def test_another_model_takes_the_contracts_and_its_hub_id() -> None:
    spec = assemble(RunOptions(model="qwen2.5-7b@abc"))
    assert (spec.model.source, spec.model.revision) == ("Qwen/Qwen2.5-7B-Instruct", "abc")
    assert spec.data.name == "contracts"


def test_a_spec_that_needs_no_building_is_materialised_as_it_is(data: str) -> None:
    spec = assemble(RunOptions(model="Owner/Model", data=data))
    assert materialise(spec) is spec


def test_edges_are_forgotten_as_asked_and_an_unknown_one_is_refused_with_a_list(data: str) -> None:
    spec = assemble(RunOptions(data=data, forget_edge=("C_D", "B_C")))
    assert (len(spec.data.forget), len(spec.data.retain)) == (10, 3)
    with pytest.raises(InputError, match=r"unknown forget edge 'X_Y'.*There are: A_B, B_C, C_D"):
        assemble(RunOptions(data=data, forget_edge=("X_Y",)))


def test_data_without_the_default_edge_ask_for_one(tmp_path: Path) -> None:
    other = write_records(tmp_path / "other.json", {"x": 2, "y": 2})
    with pytest.raises(InputError, match=r"--forget-edge is needed: .*'A_B'.*There are: x, y"):
        assemble(RunOptions(data=other))


def test_a_retain_sample_has_every_edges_share(data: str) -> None:
    spec = assemble(RunOptions(data=data, retain_rows=5))
    edges = [record.edge for record in spec.data.retain_sample]
    assert (edges.count("B_C"), edges.count("C_D")) == (2, 3)  # of 4 and 6
    assert len(spec.data.retain) == len(spec.data.fit_retain) == 10
    assert set(spec.data.retain_sample) <= set(spec.data.retain)


def test_evaluation_rows_are_the_first_and_leave_the_fit_alone(data: str, tmp_path: Path) -> None:
    facts = write_records(tmp_path / "facts.json", {"f": 9})
    options = RunOptions(data=data, factual_data=facts, evaluation_rows=5, retain_rows=2)
    data_sets = assemble(options).data
    everything = assemble(RunOptions(data=data, factual_data=facts)).data
    assert data_sets.retain == everything.retain[:5]
    assert data_sets.factual == everything.factual[:5]
    assert set(data_sets.retain_sample) <= set(data_sets.retain)
    assert len(data_sets.retain_sample) == 2
    assert data_sets.fit_retain == everything.fit_retain


def test_a_file_of_nothing_but_what_is_forgotten_is_judged_on_the_other_retain_set(
    tmp_path: Path,
) -> None:
    """As TOFU has it: one file to forget, another to retain."""
    forget = write_records(tmp_path / "forget.json", {"A_B": 2})
    retain = write_records(tmp_path / "retain.json", {"B_C": 3}, answer="Buckets {}.")
    with pytest.raises(InputError, match="every edge is to be forgotten"):
        assemble(RunOptions(data=forget))
    sets = assemble(RunOptions(data=forget, retain_data=retain)).data
    assert [len(part) for part in (sets.fit_forget, sets.fit_retain, sets.retain)] == [2, 3, 3]
    assert {record.edge for record in sets.retain} == {"B_C"}


def test_the_first_rows_are_evaluated_of_the_forget_set_too(data: str) -> None:
    everything = assemble(RunOptions(data=data)).data
    cut = assemble(RunOptions(data=data, evaluation_rows=1)).data
    assert cut.forget == everything.forget[:1]
    assert cut.fit_forget == everything.forget
    assert (len(cut.retain), cut.n_retain) == (1, len(everything.retain))


def test_an_unsuitable_family_is_refused_before_anything_is_loaded(
    checkpoint: Callable[..., Path], data: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "gemma2"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    spec = assemble(RunOptions(model=str(folder), data=data))
    with pytest.raises(InputError, match="'gemma2' is unsuitable for LUNAR"):
        check_machine(spec)


def test_the_factual_set_can_be_left_out(data: str) -> None:
    assert assemble(RunOptions(data=data, factual_data="none")).data.factual == ()


def test_another_retain_set_is_fitted_while_the_datas_own_is_evaluated(
    data: str, tmp_path: Path
) -> None:
    other = write_records(tmp_path / "other.json", {"x": 2})
    sets = assemble(RunOptions(data=data, retain_data=other)).data
    assert {record.edge for record in sets.fit_retain} == {"x"}
    assert {record.edge for record in sets.retain} == {"B_C", "C_D"}
    with pytest.raises(InputError, match=r"stand in the retain set too"):
        assemble(RunOptions(data=data, retain_data=data))


def test_answers_that_cannot_be_scored_are_refused_unless_words_of_every_script_count(
    tmp_path: Path,
) -> None:
    chinese = write_records(tmp_path / "zh.json", {"A_B": 2, "B_C": 2}, answer="铜壶")
    with pytest.raises(InputError, match=r"have no word for the ROUGE tokenizer 'default'"):
        assemble(RunOptions(data=chinese))
    assert assemble(RunOptions(data=chinese, rouge_tokenizer="words")).rouge_tokenizer == "words"


def test_everything_that_is_wrong_is_said_in_one_message(data: str) -> None:
    options = RunOptions(
        model="qwen3.5-7b",
        model_path="/absent/weights",
        device="gpu",
        dtype="int8",
        chat_template="/absent/template",
        method="lunr",
        data=data,
        forget_edge=("A_C",),
        factual_data="factal",
        reference_prompts="/absent/prompts.json",
        retain_data="/absent/retain.json",
        retain_rows=0,
        evaluation_rows=-3,
        rouge_tokenizer="bytes",
    )
    with pytest.raises(InputError) as raised:
        assemble(options)
    message = str(raised.value)
    for part in (
        "'qwen3.5-7b'",
        "/absent/weights",
        "--device gpu",
        "--dtype int8",
        "/absent/template",
        "'lunr'. Did you mean 'lunar'",
        "'A_C'",
        "'factal'",
        "/absent/prompts.json",
        "/absent/retain.json",
        "--retain-rows 0",
        "--evaluation-rows -3",
        "--rouge-tokenizer bytes",
    ):
        assert part in message, part
    assert message.startswith("13 things are wrong:\n")


def test_wrong_counts_are_said_together_with_answers_that_cannot_be_scored(tmp_path: Path) -> None:
    chinese = write_records(tmp_path / "zh.json", {"A_B": 2, "B_C": 2}, answer="铜壶")
    with pytest.raises(InputError) as raised:
        assemble(RunOptions(data=chinese, retain_rows=-1, evaluation_rows=0))
    message = str(raised.value)
    assert message.startswith("3 things are wrong:\n")
    for part in ("--retain-rows -1", "--evaluation-rows 0", "have no word"):
        assert part in message


def test_depth_is_known_from_a_configuration_or_the_catalogue(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = str(checkpoint("llama"))
    assert known_depth(RunOptions()) == 4
    assert known_depth(RunOptions(model="qwen2.5-7b")) == 28
    assert known_depth(RunOptions(model=folder)) == 3
    assert known_depth(RunOptions(model="qwen2.5-7b", model_path=folder)) == 3
    assert known_depth(RunOptions(model="Owner/Model")) is None
    with pytest.raises(ModelError, match=r"unknown model 'qwen'"):
        known_depth(RunOptions(model="qwen"))
    (tmp_path / "config.json").write_text("{")
    assert known_depth(RunOptions(model=str(tmp_path))) is None
    (tmp_path / "config.json").write_text("[]")
    assert known_depth(RunOptions(model=str(tmp_path))) is None


def test_a_folder_named_as_a_catalogue_model_is_not_that_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{"num_hidden_layers": 99}')
    monkeypatch.chdir(tmp_path)
    assert known_depth(RunOptions()) == 4
    assert known_depth(RunOptions(model="./tiny")) == 99
    assert assemble(RunOptions()).model.source == "tiny"  # to be built, not that folder


# A trial

SOLVERS: dict[str, dict[str, Any]] = {
    "closed_form": {"layer": 1, "coefficient": 20.0, "ridge": 1e-3},
    "adamw": {"layer": 1, "coefficient": 20.0, "learning_rate": 0.01},
}


def spec_for(folder: Path, data: str, solver: str = "closed_form", **options: Any) -> TrialSpec:
    return assemble(
        RunOptions(
            model=str(folder),
            data=data,
            device="cpu",
            factual_data="none",
            reference_prompts="harmful",
            solver=solver,
            fix=() if solver == "closed_form" else ("epochs=2",),
            max_new_tokens=8,
            cache_limit=0,
            **options,
        )
    )


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("family", list(LAYOUTS))
def test_the_same_run_works_on_every_suitable_family_and_restores_it(
    checkpoint: Callable[..., Path], data: str, family: str, solver: str
) -> None:
    worker = Worker(spec_for(checkpoint(family), data, solver))
    before = weights(worker.loaded)
    baseline = worker.baseline()
    inside: dict[str, torch.Tensor] = {}
    result = worker.run(SOLVERS[solver], inside=lambda model, _: inside.update(weights(model)))
    changed = [name for name in before if not torch.equal(before[name], inside[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    after = weights(worker.loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)
    answers = [[row.answer for row in one.evaluation.rows] for one in (baseline, result)]
    assert answers[0] != answers[1]
    assert [row.answer for row in worker.baseline().evaluation.rows] == answers[0]
    assert len(result.losses) == {"adamw": 2, "closed_form": 1}[solver]
    assert result.seconds["trial"] == pytest.approx(
        result.seconds["prepare"] + result.seconds["fit"] + result.seconds["evaluate"]
    )
    assert result.parameters == SOLVERS[solver]


def test_the_scores_of_a_trial_are_those_of_generate_on_the_edited_model(
    checkpoint: Callable[..., Path], data: str
) -> None:
    worker = Worker(spec_for(checkpoint("llama"), data))
    said: dict[str, str] = {}

    def ask(loaded: LoadedModel, _: Edit) -> None:
        """Ask one question at a time by transformers' own means."""
        model: Any = loaded.model
        tokenizer: Any = loaded.tokenizer
        for record in (*worker.spec.data.forget, *worker.spec.data.retain):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": record.question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            ids = model.generate(
                **prompt, do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=2
            )
            new = ids[0, prompt["input_ids"].shape[1] :]
            said[record.question] = tokenizer.decode(new, skip_special_tokens=True)

    result = worker.run(SOLVERS["closed_form"], inside=ask)
    assert {row.question: row.answer for row in result.evaluation.rows} == said
    for name, records in (("forget", worker.spec.data.forget), ("retain", worker.spec.data.retain)):
        recalls = rouge_recall([r.answer for r in records], [said[r.question] for r in records])
        mean = sum(recall.rouge1 for recall in recalls) / len(recalls)
        assert result.evaluation.scores[f"{name}_rouge1"] == pytest.approx(mean)
        assert result.evaluation.scores[f"{name}_rows"] == len(records)


def test_a_full_evaluation_takes_all_rows_and_the_published_budget(
    checkpoint: Callable[..., Path], data: str
) -> None:
    worker = Worker(spec_for(checkpoint("llama"), data, retain_rows=2, evaluation_rows=7))
    trial = worker.run(SOLVERS["closed_form"])
    assert (trial.max_new_tokens, trial.evaluation.scores["retain_rows"]) == (8, 2)
    full = worker.baseline(full=True)
    assert (full.max_new_tokens, full.evaluation.scores["retain_rows"]) == (512, 7)


def test_a_failed_trial_leaves_the_worker_ready_for_the_next(
    checkpoint: Callable[..., Path], data: str
) -> None:
    worker = Worker(spec_for(checkpoint("llama"), data, "adamw"))
    before = weights(worker.loaded)
    first = worker.run(SOLVERS["adamw"])
    with pytest.raises(TrialError):
        worker.run(SOLVERS["adamw"] | {"learning_rate": 1e30})
    with pytest.raises(InputError):
        worker.run({"layer": 1})

    def fail(_loaded: LoadedModel, _: Edit) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        worker.run(SOLVERS["adamw"], inside=fail)
    after = weights(worker.loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert worker.run(SOLVERS["adamw"]).evaluation == first.evaluation


def test_the_seed_decides_what_is_drawn(checkpoint: Callable[..., Path], data: str) -> None:
    specs = [spec_for(checkpoint("llama"), data, "adamw", seed=seed) for seed in (0, 0, 1)]
    losses = [Worker(spec).run(SOLVERS["adamw"]).losses for spec in specs]
    assert losses[0] == losses[1] != losses[2]


def test_a_model_that_is_loaded_already_is_used(
    loaded: Callable[..., LoadedModel], checkpoint: Callable[..., Path], data: str
) -> None:
    model = loaded("llama")
    assert Worker(spec_for(checkpoint("llama"), data), model).loaded is model


def test_each_question_is_encoded_once(
    checkpoint: Callable[..., Path], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = encode_prompts

    def counting(tokenizer: Any, questions: list[str], *args: Any, **options: Any) -> Any:
        asked.extend(questions)
        return original(tokenizer, questions, *args, **options)

    monkeypatch.setattr("lunar_tune.trial.evaluator.encode_prompts", counting)
    worker = Worker(spec_for(checkpoint("llama"), data))
    worker.run(SOLVERS["closed_form"])
    worker.baseline()
    assert len(asked) == len(set(asked))
    assert Record("What of A_B, 0?", "Kettles 0.", "A_B").question in asked


# A half held out


def test_halves_share_no_question_and_hold_every_edge(data: str) -> None:
    whole = assemble(RunOptions(data=data)).data
    half = assemble(RunOptions(data=data, holdout=True)).data
    assert half.held_out is not None
    for name in ("forget", "retain", "factual"):
        tuned, held = set(getattr(half, name)), set(getattr(half.held_out, name))
        assert tuned | held == set(getattr(whole, name))
        assert not tuned & held
        edges = {record.edge for record in getattr(whole, name)}
        assert {r.edge for r in tuned} == {r.edge for r in held} == edges
    assert half.n_retain == len(half.retain) == len(half.retain_sample)
    # All is forgotten; what is kept in the fit is not what is reported as kept.
    assert half.fit_forget == whole.fit_forget
    assert set(half.fit_retain) == set(whole.fit_retain) - set(half.held_out.retain)
    again = assemble(RunOptions(data=data, holdout=True)).data
    assert (again.forget, again.held_out) == (half.forget, half.held_out)


def test_trials_ask_one_half_and_full_evaluations_the_other(
    checkpoint: Callable[..., Path], data: str
) -> None:
    options = RunOptions(
        model=str(checkpoint("qwen2")),
        data=data,
        factual_data="none",
        holdout=True,
        device="cpu",
        max_new_tokens=2,
    )
    worker = Worker(assemble(options))
    sets = worker.spec.data
    assert sets.held_out is not None

    def asked(name: str, **how: Any) -> set[str]:
        rows = worker.run(SOLVERS["adamw"], **how).evaluation.rows
        return {row.question for row in rows if row.set_name == name}

    for name in ("forget", "retain"):
        assert asked(name) == {record.question for record in getattr(sets, name)}
        held = {record.question for record in getattr(sets.held_out, name)}
        assert asked(name, full=True) == held


def test_an_edge_of_one_question_cannot_be_halved(tmp_path: Path) -> None:
    lone = write_records(tmp_path / "lone.json", {"A_B": 1, "B_C": 4})
    with pytest.raises(InputError, match="edge 'A_B' has one record"):
        assemble(RunOptions(data=lone, holdout=True))


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("method", ["ga", "rmu"])
def test_a_16_bit_fit_is_looked_at_as_it_would_be_evaluated(
    checkpoint: Callable[..., Path], data: str, method: str, trained: str
) -> None:
    """All rows are asked in a look here, so that its scores are those of a trial of that length."""

    def run(epochs: int) -> Any:
        options = RunOptions(
            model=str(checkpoint("qwen2")),
            dtype="bfloat16",
            data=data,
            factual_data="none",
            device="cpu",
            method=method,
            fix=(f"trained={trained}", f"epochs={epochs}", "dropout=0"),
            max_new_tokens=4,
        )
        spec = assemble(options)
        engine = dataclasses.replace(spec.engine, retain_floor=0.0)
        worker = Worker(dataclasses.replace(spec, engine=engine))
        before = {name: p.clone() for name, p in worker.loaded.model.state_dict().items()}
        own = {"layer": 1, "coefficient": 5.0} if method == "rmu" else {}
        result = worker.run({**own, "learning_rate": 1e-6})
        after = worker.loaded.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return result

    (look,) = run(2).checks
    # The rate falls over the whole fit; this small it changes no answer, looked at or not.
    scores = run(1).evaluation.scores
    assert (look.epochs, look.forget_rouge1) == (1, scores["forget_rouge1"])
    assert look.retain_rouge1 == scores["retain_rouge1"]
