"""Options become a spec: data, edges and groups, rows, halves; mistakes are said at once."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trial_specs import write_records

from lunar_tune.config.options import RunOptions, SearchConfig
from lunar_tune.data.records import Record
from lunar_tune.data.splits import groups_file
from lunar_tune.driver.plan import plan_search
from lunar_tune.errors import InputError
from lunar_tune.trial.assemble import assemble, check_machine, known_depth, materialise
from lunar_tune.trial.spec import DataSets


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "pairs.json"
    groups = {"last": ["B_C", "C_D"], "everything": ["A_B", "B_C", "C_D"], "B_C": ["A_B"]}
    groups_file(file).write_text(json.dumps(groups))
    return write_records(file, {"A_B": 3, "B_C": 4, "C_D": 6})


def sets_of(data: str, *edges: str, **options: Any) -> DataSets:
    return assemble(RunOptions(data=data, forget_edge=edges, **options)).data


def edges_of(records: Any) -> set[str]:
    return {record.edge for record in records}


def message_of(**options: Any) -> str:
    with pytest.raises(InputError) as raised:
        assemble(RunOptions(**options))
    return str(raised.value)


def test_without_options_a_run_is_tiny_on_mini_with_the_default_edge() -> None:
    spec = assemble(RunOptions())
    assert (spec.model.source, spec.data.name, spec.data.forget_edges) == ("tiny", "mini", ("A_B",))
    assert edges_of(spec.data.forget) == {"A_B"}
    assert "A_B" not in edges_of(spec.data.retain)
    assert spec.data.retain == spec.data.fit_retain == spec.data.retain_sample
    assert spec.data.factual
    assert spec.data.reference_prompts
    sent = pickle.loads(pickle.dumps(spec))
    assert (sent.data, sent.model, sent.chat) == (spec.data, spec.model, spec.chat)
    other = assemble(RunOptions(model="qwen2.5-7b@abc"))
    assert (other.model.revision, other.data.name) == ("abc", "general")
    assert materialise(other) is other, "it needs no building"


def test_depth_and_family_are_known_from_a_configuration_or_the_catalogue(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(checkpoint("llama"))
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(InputError, match="'gemma2' is unsuitable for LUNAR"):
        check_machine(assemble(RunOptions(model=str(tmp_path))))
    assert known_depth(RunOptions(model="qwen2.5-7b")) == 28
    assert known_depth(RunOptions(model="Owner/Model", model_path=folder)) == 3
    wrong = message_of(model="qwen2.5-7b", model_path=folder)
    assert f"{folder}: has 3 decoder blocks, --model qwen2.5-7b has 28" in wrong
    assert known_depth(RunOptions(model="Owner/Model")) is None
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in message_of(model=str(tmp_path))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{"num_hidden_layers": 99}')
    monkeypatch.chdir(tmp_path)
    assert known_depth(RunOptions(model="./tiny")) == 99
    assert known_depth(RunOptions()) == 4


def test_edges_are_forgotten_as_asked_and_groups_of_edges_keep_their_name(data: str) -> None:
    assert [len(part) for part in (sets_of(data, "B_C").forget, sets_of(data).forget)] == [4, 3]
    for edges in (("C_D", "B_C"), ("last",)):
        sets = sets_of(data, *edges)
        assert (len(sets.forget), len(sets.retain)) == (10, 3)
        assert sets.forget_edges == edges
    assert edges_of(sets_of(data, "B_C").forget) == {"B_C"}, "an edge wins over a group"
    everything = sets_of(data, "everything", retain_data="mini")
    assert (len(everything.forget), everything.n_retain) == (13, 96)


def test_edges_that_cannot_be_forgotten_are_refused(data: str, tmp_path: Path) -> None:
    unknown = message_of(data=data, forget_edge=("X_Y",))
    assert "unknown forget edge 'X_Y'. There are: A_B, B_C, C_D. Groups of edges: last" in unknown
    assert "every edge is to be forgotten" in message_of(data=data, forget_edge=("everything",))
    file = tmp_path / "other.json"
    message = message_of(data=write_records(file, {"x": 2, "y": 2}))
    for part in (
        "--forget-edge is needed: ",
        "none of the defaults A_B, ",
        "There are: x, y",
    ):
        assert part in message
    groups_file(file).write_text("[]")
    message = message_of(data=str(file), forget_edge=("x",), model="nothing")
    assert message.startswith("2 things are wrong")
    assert "must be an object of lists" in message


def test_evaluation_rows_and_retain_rows_leave_the_fit_alone(data: str, tmp_path: Path) -> None:
    """A retain sample has every edge's share, of 4 and 6 rows; evaluation rows are the first."""
    facts = write_records(tmp_path / "facts.json", {"f": 9})
    everything = sets_of(data, factual_data=facts, retain_rows=5)
    cut = sets_of(data, factual_data=facts, evaluation_rows=2, retain_rows=1)
    edges = [record.edge for record in everything.retain_sample]
    assert (edges.count("B_C"), edges.count("C_D")) == (2, 3)
    for name in ("forget", "retain", "factual"):
        assert getattr(cut, name) == getattr(everything, name)[:2]
    for sets in (everything, cut):
        assert set(sets.retain_sample) < set(sets.retain)
    assert (cut.fit_forget, cut.fit_retain) == (everything.fit_forget, everything.fit_retain)
    assert cut.n_retain == len(everything.retain) == len(cut.fit_retain) == 10
    assert sets_of(data, factual_data="none").factual == ()


def test_another_retain_set_is_fitted_and_the_own_evaluated(data: str, tmp_path: Path) -> None:
    """If there is one: TOFU has one file to forget and another to retain."""
    other = write_records(tmp_path / "other.json", {"x": 2})
    sets = sets_of(data, retain_data=other)
    assert edges_of(sets.fit_retain) == {"x"}
    assert edges_of(sets.retain) == {"B_C", "C_D"}
    assert "stand in the retain set too" in message_of(data=data, retain_data=data)
    forget = write_records(tmp_path / "forget.json", {"A_B": 2}, answer="Buckets {}.")
    assert "every edge is to be forgotten" in message_of(data=forget)
    sets = sets_of(forget, retain_data=other)
    assert [len(part) for part in (sets.fit_forget, sets.fit_retain, sets.retain)] == [2, 2, 2]
    assert edges_of(sets.retain) == {"x"}


def test_a_file_without_edges_is_given_one_and_what_is_odd_about_files_is_noted(
    tmp_path: Path,
) -> None:
    rows = [{"instruction": f"What is {n}?", "output": f"Kettle {n}."} for n in range(4)]
    (data := tmp_path / "rows.json").write_text(json.dumps(rows))
    (factual := tmp_path / "facts.json").write_text(json.dumps(rows[:1]))
    message = message_of(data=str(data))
    assert "field 'edge': is missing (the row has 'instruction', 'output'); add it, or" in message
    other = {"retain_data": "mini", "factual_data": str(factual)}
    assert "leave one to retain" in message_of(data=str(data), edge="all")
    sets = sets_of(str(data), edge=" all", **other)
    assert (sets.forget_edges, edges_of(sets.forget), len(sets.forget)) == (("all",), {"all"}, 4)
    shape = "the question is 'instruction', the answer is 'output'"
    both = "1 of the factual questions are to be forgotten"
    assert sets.notes == (f"rows.json: {shape}", f"facts.json: {shape}", both)
    assert sets_of("mini").notes == ()
    assert sets_of("mini", edge="all").notes == ("--edge all: every row has an edge of its own",)


def test_halves_share_no_question_and_hold_every_edge(data: str, tmp_path: Path) -> None:
    whole, half = sets_of(data), sets_of(data, holdout=True)
    assert half.held_out is not None
    for name in ("forget", "retain", "factual"):
        tuned, held = set(getattr(half, name)), set(getattr(half.held_out, name))
        assert tuned | held == set(getattr(whole, name))
        assert not tuned & held
        assert edges_of(tuned) == edges_of(held) == edges_of(getattr(whole, name))
    assert half.n_retain == len(half.retain) == len(half.retain_sample)
    # All is forgotten; what is kept in the fit is not what is reported as kept.
    assert half.fit_forget == whole.fit_forget
    assert set(half.fit_retain) == set(whole.fit_retain) - set(half.held_out.retain)
    assert sets_of(data, holdout=True) == half
    lone = write_records(tmp_path / "lone.json", {"A_B": 1, "B_C": 4})
    assert "edge 'A_B' has one question" in message_of(data=lone, holdout=True)


def test_an_edge_with_one_of_the_models_own_answers_is_judged_whole_and_noted() -> None:
    answers = [Record(f"question {n}", "an answer", edge) for n, edge in enumerate("aabbc")]
    options = RunOptions(model="smollm2-135m", forget_edge=("a",), holdout=True)
    sets = assemble(options, answers).data
    assert sets.held_out is not None
    assert [one.edge for one in (*sets.retain, *sets.held_out.retain)] == ["b", "c", "b"]
    assert "one answer each, which is not held out: c" in sets.notes
    options = dataclasses.replace(options, forget_edge=("c",))
    with pytest.raises(InputError, match="no edge of the forget set has two answers"):
        assemble(options, answers)


def test_everything_that_is_wrong_is_said_in_one_message(tmp_path: Path) -> None:
    wrong = {
        "model": ("qwen3.5-7b", "'qwen3.5-7b'"),
        "model_path": ("/absent/weights", "/absent/weights"),
        "device": ("gpu", "--device gpu"),
        "dtype": ("int8", "--dtype int8"),
        "chat_template": ("/absent/template", "/absent/template"),
        "method": ("lunr", "'lunr'. Did you mean 'lunar'"),
        "factual_data": ("factal", "'factal'"),
        "reference_prompts": ("/absent/prompts.json", "/absent/prompts.json"),
        "retain_data": ("/absent/retain.json", "/absent/retain.json"),
        "retain_rows": (0, "--retain-rows 0"),
        "evaluation_rows": (-3, "--evaluation-rows -3"),
        "embedding_model": ("./nosuch", "--embedding-model ./nosuch: no such folder"),
    }
    chinese = write_records(tmp_path / "zh.json", {"A_B": 2, "B_C": 2}, answer="铜壶")
    message = message_of(data=chinese, **{name: value for name, (value, _) in wrong.items()})
    for _, part in wrong.values():
        assert part in message, part
    assert "have no word for the ROUGE tokenizer" in message_of(data=chinese)
    assert assemble(RunOptions(data=chinese, rouge_tokenizer="words")).rouge_tokenizer == "words"
    spanish = write_records(tmp_path / "es.json", {"A_B": 2, "B_C": 2}, answer="José Pérez.")
    told = plan_search(SearchConfig(data=spanish, factual_data="none", output=tmp_path)).facts
    assert "4 of 4 true answers (edges: A_B, B_C) lose up to 22%" in told["  lost letters"]
    assert not assemble(RunOptions()).lost_letters
