"""The published forget.yaml: every key finds its place or a reason, mistakes come at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.files import datasets_dir
from lunar_tune.methods.lunar.method import LunarMethod
from lunar_tune.trial.assemble import assemble, configured
from lunar_tune.trial.published_config import read_published_config
from lunar_tune.yaml_files import write_yaml

QWEN = "Qwen/Qwen2.5-7B-Instruct"
# The keys of the published file, with values of our own.
KEYS: dict[str, Any] = {
    "model_family": "Qwen2.5-7B-Instruct",
    "base_model_path": QWEN,
    "model_path": "${base_model_path}",
    "data_name": "pairs",
    "forget_edge": ["A_B"],
    "use_different_retain_dataset": False,
    "different_retain_set_path": "dataset/unlearning/facts.json",
    "layer_modified": [19],
    "coeff_list": [2.5],
    "use_harmful": True,
    "use_unverified": False,
    "num_epochs": 7,
    "lr": 0.004,
    "positions": -1,
    "n_train": 128,
    "n_test": 100,
    "n_val": 32,
    "max_new_tokens": 64,
    "eval_batch_size": 8,
    "eval_generation_max_length": 512,
    "eval_generation_max_new_tokens": 300,
    "if_eval_factual": True,
    "factual_data_path": "dataset/unlearning/facts.json",
    "compute_es_score": True,
    "save_unlearned_model": False,
    "save_unlearned_model_path": "out/${data_name}/${forget_edge}",
    "save_folder": "x",
    "save_path": "runs/${save_folder}",
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as the published repository; the current folder is elsewhere."""
    root = tmp_path / "repository"
    for folder in ("config", "dataset/unlearning", "dataset/splits", "tuned"):
        (root / folder).mkdir(parents=True)
    shutil.copy(datasets_dir() / "mini.json", root / "dataset/unlearning/pairs.json")
    shutil.copy(datasets_dir() / "factual.json", root / "dataset/unlearning/facts.json")
    shutil.copy(datasets_dir() / "harmful.json", root / "dataset/splits/harmful.json")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return root


Read = tuple[RunOptions, Path | None, list[str]]


def read_all(repository: Path, *without: str, **changed: Any) -> Read:
    """Read the file with some keys left out and some changed."""
    content = {key: value for key, value in (KEYS | changed).items() if key not in without}
    path = repository / "config" / "forget.yaml"
    path.write_text(write_yaml(content), encoding="utf-8")
    return read_published_config(path)


def read(repository: Path, *without: str, **changed: Any) -> RunOptions:
    return read_all(repository, *without, **changed)[0]


def message(repository: Path, *without: str, **changed: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(repository, *without, **changed)
    assert str(caught.value).startswith(str(repository / "config" / "forget.yaml"))
    return str(caught.value)


def test_every_deciding_key_becomes_an_option(repository: Path) -> None:
    options, save_to, _ = read_all(repository)

    assert options.model == "qwen2.5-7b"
    assert options.model_path is None
    assert options.data == str(repository / "dataset/unlearning/pairs.json")
    assert options.forget_edge == ("A_B",)
    assert options.retain_data is None
    assert options.factual_data == str(repository / "dataset/unlearning/facts.json")
    assert options.reference_prompts == str(repository / "dataset/splits/harmful.json")
    assert options.max_new_tokens == 300
    assert options.fix == (
        *("layer=19", "coefficient=2.5", "learning_rate=0.004", "epochs=7"),
        "master_dtype=bfloat16",
    )
    assert save_to is None


def test_what_the_published_code_always_does_is_done(repository: Path) -> None:
    options = read(repository)

    assert options.chat_template == "published"
    assert options.evaluation_rows == 200
    method, parameters = configured(options)
    assert isinstance(method, LunarMethod)
    settings = method.settings
    assert (settings.solver, settings.positions) == ("adamw", "all")
    assert settings.retain_points is None
    assert settings.master_dtype == "bfloat16"
    assert settings.decay == 0.01  # torch's default, which that code does not change
    assert parameters == {"layer": 19, "coefficient": 2.5, "learning_rate": 0.004}


def test_the_options_can_be_assembled(repository: Path) -> None:
    data = assemble(read(repository, use_different_retain_dataset=True)).data

    assert {record.edge for record in data.forget} == {"A_B"}
    assert len(data.fit_retain) == len(data.factual)  # the facts are the fit's retain set here
    assert "A_B" not in {record.edge for record in data.retain}


def test_keys_without_a_part_in_a_run_are_named_in_the_order_of_the_file(repository: Path) -> None:
    assert read_all(repository)[2] == [
        *("n_train", "n_test", "n_val", "max_new_tokens"),
        *("eval_batch_size", "eval_generation_max_length", "compute_es_score"),
        *("save_folder", "save_path"),
    ]


def test_an_unknown_key_is_refused_with_a_close_name(repository: Path) -> None:
    assert "num_epoch: is unknown. Did you mean 'num_epochs'?" in message(repository, num_epoch=3)


def test_keys_that_are_not_there_take_the_published_values(repository: Path) -> None:
    absent = ("num_epochs", "eval_generation_max_new_tokens", "eval_batch_size", "positions")
    options = read(repository, *absent)

    assert "epochs=20" in options.fix
    assert options.max_new_tokens == 512


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama3-8b-instruct", "llama3-8b"),
        ("LLAMA3-8B-INSTRUCT", "llama3-8b"),
        ("Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("llama2-7b-chat", "llama2-7b"),
        ("gemma-7b-it", "gemma-7b"),
        ("mistral-7b-instruct", "mistral-7b"),
        ("llama3-8b-base", "llama3-8b-base"),  # another model, which is not in the catalogue
    ],
)
def test_a_family_alone_names_a_catalogue_model(repository: Path, family: str, name: str) -> None:
    run = read(repository, "base_model_path", "model_path", model_family=family)

    assert run.model == name


def test_the_base_path_wins_over_the_family(repository: Path) -> None:
    run = read(repository, model_family="zephyr-7b", base_model_path="someone/zephyr-7b")
    assert run.model == "someone/zephyr-7b"
    run = read(repository, base_model_path="meta-llama/Llama-3.2-3B-Instruct")
    assert run.model == "llama3.2-3b"
    alone = read(repository, "base_model_path", "model_path", model_family="zephyr-7b")
    with pytest.raises(InputError, match="unknown model 'zephyr-7b'"):
        assemble(alone)


def test_fine_tuned_weights_in_a_folder_become_the_model_path(repository: Path) -> None:
    for written in ("tuned", str(repository / "tuned")):
        run = read(repository, model_path=written)
        assert run.model == "qwen2.5-7b"
        assert run.model_path == str(repository / "tuned")

    alone = read(repository, "base_model_path", model_family="zephyr", model_path="tuned")
    assert alone.model == str(repository / "tuned")
    assert alone.model_path is None


def test_fine_tuned_weights_on_the_hub_become_the_model(repository: Path) -> None:
    run = read(repository, model_path="someone/tuned-qwen")

    assert run.model == "someone/tuned-qwen"
    assert run.model_path is None


def test_a_base_path_may_be_a_folder(repository: Path) -> None:
    assert read(repository, base_model_path="tuned").model == str(repository / "tuned")


def test_references_are_resolved_within_the_file(repository: Path) -> None:
    run, save_to, _ = read_all(
        repository,
        save_unlearned_model=True,
        save_unlearned_model_path="out/${data_name}/${model_family}/${forget_edge}",
        forget_edge=["A_B", "B_C"],
        save_path="${now:%Y}",  # what is ignored is not resolved
    )

    assert run.model == "qwen2.5-7b"  # model_path refers to base_model_path
    assert save_to == Path("out/pairs/Qwen2.5-7B-Instruct/A_B_B_C")


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        (
            {"data_name": "${nowhere}"},
            "data_name: the text '${nowhere}' refers to no key of this file, or in a circle; write",
        ),
        ({"forget_edge": ["${lr}"]}, "forget_edge: ['${lr}'] refers to no key"),
        ({"data_name": "a${b"}, "data_name: the text 'a${b' refers to no key"),
        ({"data_name": "${lr}" + "x" * 5000}, "data_name: is the text '0.004xxx"),
        (
            {"data_name": "x/${oc.env:DATA}"},
            "data_name: the text 'x/${oc.env:DATA}' refers to no key",
        ),
        (
            {"data_name": "${model_family}", "model_family": "${data_name}"},
            "model_family: the text '${data_name}' refers to no key of this file, or in a circle",
        ),
    ],
)
def test_a_reference_that_leads_nowhere_is_named(
    repository: Path, changed: dict[str, Any], fragment: str
) -> None:
    assert fragment in message(repository, **changed)


def test_data_are_looked_for_beside_above_and_in_the_current_folder(repository: Path) -> None:
    here = Path("dataset/unlearning")
    here.mkdir(parents=True)
    shutil.copy(datasets_dir() / "mini.json", here / "other.json")

    assert read(repository, data_name="other").data == str((here / "other.json").resolve())
    assert read(repository, data_name="mini").data == "mini"  # the shipped one
    found = message(repository, data_name="absent")
    assert f"data_name: is the text 'absent', no file beside or above {repository}" in found
    assert "no shipped name (there are: mini," in found


def test_reference_prompts_that_are_not_there_are_the_shipped_ones(repository: Path) -> None:
    run = read(repository, use_harmful=False, use_unverified=True)

    assert run.reference_prompts == "unverifiable"


def test_another_retain_set_and_no_factual_set(repository: Path) -> None:
    run = read(repository, use_different_retain_dataset=True, if_eval_factual=False)

    assert run.retain_data == str(repository / "dataset/unlearning/facts.json")
    assert run.factual_data == "none"


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"use_unverified": True}, "use_harmful, use_unverified: set one"),
        ({"use_harmful": False}, "use_harmful, use_unverified: set one"),
        ({"layer_modified": [19, 20]}, "layer_modified, coeff_list: give one coefficient for each"),
        ({"layer_modified": [-1]}, "layer_modified[0]: is -1; it should be greater than or equal"),
        ({"layer_modified": 19}, "layer_modified: is 19; it should be a valid list"),
        ({"layer_modified": []}, "layer_modified: is []; List should have at least 1 item"),
        ({"coeff_list": [float("nan")]}, "coeff_list[0]: is nan; it should be a finite number"),
        ({"forget_edge": [12]}, "forget_edge[0]: is 12; it should be a valid string"),
        ({"positions": -2}, "positions: is -2; it should be -1"),
        ({"lr": "0.01"}, "lr: is the text '0.01'; it should be a valid number"),
        ({"lr": None}, "lr: is empty; it should be a valid number"),
        ({"if_eval_factual": 1}, "if_eval_factual: is 1; it should be a valid boolean"),
        ({"factual_data_path": "x.json"}, "factual_data_path: is the text 'x.json', no file"),
        ({"factual_data_path": None}, "factual_data_path: is empty, no file"),
        (
            {"save_unlearned_model": True, "save_unlearned_model_path": ""},
            "save_unlearned_model_path: is missing or empty",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key(
    repository: Path, changed: dict[str, Any], fragment: str
) -> None:
    assert fragment in message(repository, **changed)


def test_mistakes_of_one_kind_come_in_one_message(repository: Path) -> None:
    types = message(repository, "layer_modified", lr="0.01", forget_edge="A_B")
    for fragment in ("layer_modified: is missing", "lr: is the text", "forget_edge: is the text"):
        assert fragment in types
    meaning = message(repository, data_name="absent", use_harmful=False, coeff_list=[1, 2])
    for fragment in ("data_name: is the text 'absent'", "use_harmful, use", "coeff_list: give"):
        assert fragment in meaning


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_published_config(tmp_path / "absent.yaml")
