"""The command line of a single run: results, files, saved model, published configuration."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import command_lines
import pytest
import torch
from command_lines import small_data, without_ray
from transformers import AutoModelForCausalLM
from trial_specs import generated

from lunar_tune.cli.unlearn import unlearn as COMMAND

refused = partial(command_lines.refused, COMMAND)
succeeded = partial(command_lines.succeeded, COMMAND)

SETTING = ("layer=1", "coefficient=2.0", "learning_rate=0.01", "epochs=2")
KEYS = {
    *("forget_rouge1", "retain_rouge1", "forget_rougeL", "retain_rougeL", "deviation_score"),
    *("forget_rows", "retain_rows", "model", "data", "forget_edges", "method", "solver"),
    *("parameters", "max_new_tokens", "seed", "seconds", "losses", "baseline"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_a_run_writes_its_scores_and_answers_and_a_model_that_gives_them(small: list[str]) -> None:
    metrics = ("--metrics", "forget_mrr, retain_mrr,retain_perplexity")
    output = succeeded(*small, *SETTING, *metrics, "--json", "s.json", "--save", "model")
    document = json.loads(Path("s.json").read_text())
    rows = document["answers"]
    assert set(document) >= KEYS
    assert document["parameters"] == {"layer": 1, "coefficient": 2.0, "learning_rate": 0.01}
    assert (document["forget_rows"], document["retain_rows"]) == (3, 6)
    assert (document["max_new_tokens"], document["seed"]) == (4, 0)
    assert len(document["losses"]) == 2, "an epoch each"
    assert set(document["baseline"]) >= {"forget_rouge1", "retain_rouge1"}
    assert [row["set_name"] for row in rows] == ["forget"] * 3 + ["retain"] * 6
    prompt = "forget prompt: <|bos|><|im_start|>user\\n"
    for line in (prompt, "base model", "unlearned", "scores and answers written to s.json"):
        assert line in output
    for name in ("forget_mrr", "retain_mrr", "retain_perplexity"):
        (line,) = [line.split() for line in output.splitlines() if line.startswith(name)]
        better = "higher" if name == "retain_mrr" else "lower"
        scores = (document["baseline"][name], document[name])
        assert line == [name, *(f"{score:.4g}" for score in scores), better]
    assert "forget_hit_ratio" not in document

    model = AutoModelForCausalLM.from_pretrained("model").eval()
    said = generated(Path("model"), model, [row["question"] for row in rows], budget=4)
    assert said == [row["answer"] for row in rows]
    original = AutoModelForCausalLM.from_pretrained(small[small.index("--model") + 1])
    saved = model.state_dict()
    changed = [name for name, p in original.state_dict().items() if not torch.equal(p, saved[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]


def test_the_closed_form_takes_a_ridge_and_quiet_shows_nothing(small: list[str]) -> None:
    arguments = ("--solver", "closed_form", "layer=0", "coefficient=2", "ridge=0.1")
    assert succeeded(*small, *arguments, "--json", "s.json", "--quiet") == ""
    document = json.loads(Path("s.json").read_text())
    assert (document["solver"], len(document["losses"])) == ("closed_form", 1)
    shown = succeeded(*small, *arguments[:-1], "--json", "s.json")
    assert "ridge 0.01, since none is given" in shown
    assert json.loads(Path("s.json").read_text())["parameters"]["ridge"] == 0.01


def test_a_setting_that_cannot_be_is_refused(small: list[str]) -> None:
    for arguments, expected in (
        (("layer=1", "learning_rate=0.01"), "missing: coefficient;"),
        (("--method", "ga", *SETTING[:3]), "layer"),
        ((*SETTING, "trained=full"), "trained"),
        (
            ("--method", "rmu", "layer=1", "learning_rate=0.1", "beta=0"),
            "beta 0.0: must be more than 0",
        ),
        (("layer=x", *SETTING[1:]), "layer x: "),
        (("layer=-1", *SETTING[1:]), "3 decoder blocks"),
        (("layer=1,1", *SETTING[1:]), "layer 1, 1: a layer is named twice"),
        (("layer=1,2", "coefficient=1,2,3", *SETTING[2:]), "3 coefficients"),
        ((*SETTING[:2], "learning_rate=-1"), "learning_rate -1: must be a positive number"),
        ((*SETTING, "--metrics", " , "), "--metrics is empty"),
    ):
        assert expected in refused(*small, *arguments)


def test_everything_that_is_wrong_is_said_before_the_model_is_loaded(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("f").touch()
    monkeypatch.setattr("lunar_tune.trial.worker.load_model", None)
    setting = ("layer=9", "coefficient=nan", "learning_rate=inf", "--forget-edge", "Q")
    message = refused(*small, *setting, "--evaluation-rows", "0", "--save", "f/x")
    for part in (
        *("layer 9: the model has", "coefficient nan", "learning_rate inf", "edge 'Q'"),
        *("--evaluation-rows 0", "--save f/x"),
    ):
        assert message.count(part) == 1
    assert message.startswith("error: 6 things are wrong:")


def test_a_divergence_is_an_error_and_no_score(small: list[str]) -> None:
    result = without_ray(COMMAND, *small, *SETTING[:2], "learning_rate=1e30", "--json", "s.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert not Path("s.json").exists()


@pytest.fixture
def published(tmp_path: Path, small: list[str]) -> Path:
    """Return a configuration file in a repository of the published code's layout."""
    repository = tmp_path / "repository"
    for folder in ("config", "dataset/unlearning", "dataset/splits"):
        (repository / folder).mkdir(parents=True)
    small_data(repository).rename(repository / "dataset/unlearning/pairs.json")
    prompts = [{"instruction": f"Where is nowhere {n}?"} for n in range(3)]
    (repository / "dataset/splits/harmful.json").write_text(json.dumps(prompts))
    path = repository / "config/forget.yaml"
    path.write_text(f"""
model_family: Qwen2.5-7B-Instruct
model_path: {small[small.index("--model") + 1]}
base_model_path: {small[small.index("--model") + 1]}
data_name: pairs
forget_edge: ['A_B']
layer_modified: [1, 2]
coeff_list: [2.0, 1.0]
positions: -1
num_epochs: 3
lr: 0.01
use_harmful: true
use_unverified: false
use_different_retain_dataset: false
if_eval_factual: false
save_unlearned_model: true
save_unlearned_model_path: saved
eval_batch_size: 4
eval_generation_max_new_tokens: 3
""")
    return path


def test_a_published_configuration_runs_as_it_is(published: Path) -> None:
    output = succeeded("--published-config", str(published), "--json", "s.json", "--device", "cpu")
    document = json.loads(Path("s.json").read_text())
    found = {"layer": [1, 2], "coefficient": [2.0, 1.0], "learning_rate": 0.01}
    assert document["parameters"] == found
    assert (len(document["losses"]), document["max_new_tokens"]) == (3, 3)
    assert (document["data"], document["forget_edges"]) == ("pairs", ["A_B"])
    written = " ".join(output.split())
    assert "says: lunar-tune unlearn " in written
    assert "--fix layer=1,2 --fix coefficient=2.0,1.0 --fix learning_rate=0.01" in written
    assert "keys that decide nothing here: eval_batch_size" in written
    AutoModelForCausalLM.from_pretrained("saved")


def test_options_beside_a_published_configuration_win(published: Path) -> None:
    options = ("--solver", "closed_form", "layer=0", "coefficient=3", "ridge=0.1")
    options += ("--save", "other", "--json", "s.json", "--device", "cpu")
    succeeded("--published-config", str(published), *options)
    document = json.loads(Path("s.json").read_text())
    assert document["parameters"] == {"layer": 0, "coefficient": 3.0, "ridge": 0.1}
    assert Path("other/config.json").exists()
    assert not Path("saved").exists()


def test_a_published_configuration_that_is_wrong_is_refused(published: Path) -> None:
    published.write_text(published.read_text().replace("[1, 2]", "[1, 3]"))
    output = refused("--published-config", str(published), "--device", "cpu")
    assert "layer 3: the model has 3 decoder blocks" in output
    assert "nosuch.yaml" in refused("--published-config", "nosuch.yaml")
