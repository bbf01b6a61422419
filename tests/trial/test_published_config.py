"""The published forget.yaml: every key finds its place or a reason, mistakes come at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lunar_tune.errors import InputError
from lunar_tune.paths import datasets_dir
from lunar_tune.trial.assemble import assemble
from lunar_tune.trial.published.configuration import PublishedRun, read_published_config

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


def read(repository: Path, *without: str, **changed: Any) -> PublishedRun:
    """Read the file with some keys left out and some changed."""
    content = {key: value for key, value in (KEYS | changed).items() if key not in without}
    path = repository / "config" / "forget.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return read_published_config(path)


def message(repository: Path, *without: str, **changed: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(repository, *without, **changed)
    assert str(caught.value).startswith(str(repository / "config" / "forget.yaml"))
    return str(caught.value)


def became(run: PublishedRun, key: str) -> str:
    (note,) = (note for note in run.notes if note.key == key)
    return note.became


def test_every_deciding_key_becomes_an_option(repository: Path) -> None:
    run = read(repository)
    options = run.options

    assert options.model == "qwen2.5-7b"
    assert options.model_path is None
    assert options.data == str(repository / "dataset/unlearning/pairs.json")
    assert options.forget_edges == ("A_B",)
    assert options.retain_data is None
    assert options.factual_data == str(repository / "dataset/unlearning/facts.json")
    assert options.reference_prompts == str(repository / "dataset/splits/harmful.json")
    assert options.lunar.adamw.epochs == 7
    assert options.decoding.max_new_tokens == 300
    assert options.decoding.batch_size == 8
    assert run.parameters == {"layer": [19], "coefficient": [2.5], "learning_rate": 0.004}
    assert run.save_to is None


def test_what_the_published_code_always_does_is_done(repository: Path) -> None:
    options = read(repository).options

    assert options.chat_template == "published"
    assert options.evaluation_rows == 200
    assert options.lunar.solver == "adamw"
    assert options.lunar.positions == "all"
    assert options.lunar.retain_points is None
    assert options.lunar.adamw.master_dtype == "bfloat16"
    assert options.lunar.adamw.decay == 0.01  # torch's default, which that code does not change


def test_the_options_can_be_assembled(repository: Path) -> None:
    data = assemble(read(repository, use_different_retain_dataset=True).options).data

    assert {record.edge for record in data.forget} == {"A_B"}
    assert len(data.fit_retain) == len(data.factual)  # the facts are the fit's retain set here
    assert "A_B" not in {record.edge for record in data.retain}


def test_every_key_of_the_file_has_one_note_in_its_order(repository: Path) -> None:
    notes = read(repository, colour="red").notes
    keys = [note.key for note in notes]

    assert keys[: len(KEYS) + 1] == [*KEYS, "colour"]
    assert len(set(keys)) == len(keys)
    assert all(note.became and note.value for note in notes)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("colour", "unknown: no key of the published code"),
        ("n_train", "the published code does not use it either"),
        ("max_new_tokens", "does not use it either"),
        ("eval_generation_max_length", "ignored"),
        ("compute_es_score", "ignored: extraction strength"),
        ("save_path", "ignored: --output"),
        ("use_unverified", "unused: use_harmful is true"),
        ("different_retain_set_path", "unused: use_different_retain_dataset is not true"),
        ("save_unlearned_model_path", "unused: save_unlearned_model is not true"),
        ("lr", "--learning-rate 0.004"),
        ("layer_modified", "--layer 19"),
        ("rows evaluated", "--evaluation-rows 200"),
    ],
)
def test_a_note_says_what_was_made_of_a_key(repository: Path, key: str, words: str) -> None:
    assert words in became(read(repository, colour="red"), key)


def test_keys_that_are_not_there_take_the_published_values_and_say_so(repository: Path) -> None:
    run = read(
        repository, "num_epochs", "eval_generation_max_new_tokens", "eval_batch_size", "positions"
    )
    notes = {note.key: note for note in run.notes}

    assert run.options.lunar.adamw.epochs == 20
    assert run.options.decoding.max_new_tokens == 512
    assert run.options.decoding.batch_size is None
    assert notes["num_epochs"].value == "not in the file"
    assert notes["num_epochs"].became == "--epochs 20"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama3-8b-instruct", "llama3-8b"),
        ("LLAMA3-8B-INSTRUCT", "llama3-8b"),
        ("Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Qwen2-7B-Instruct", "qwen2-7b"),
        ("llama2-7b-chat", "llama2-7b"),
        ("gemma-7b-it", "gemma-7b"),
        ("mistral-7b-instruct", "mistral-7b"),
        ("Mistral-7B-Instruct-v0.3", "mistral-7b"),
    ],
)
def test_a_family_alone_names_a_catalogue_model(repository: Path, family: str, name: str) -> None:
    run = read(repository, "base_model_path", "model_path", model_family=family)

    assert run.options.model == name
    assert became(run, "model_family") == f"--model {name}"


def test_an_unknown_family_falls_back_to_the_base_path(repository: Path) -> None:
    run = read(repository, model_family="zephyr-7b", base_model_path="someone/zephyr-7b")

    assert run.options.model == "someone/zephyr-7b"
    assert "unused: base_model_path" in became(run, "model_family")
    assert "model_family: is the text 'zephyr-7b', which is not known" in message(
        repository, "base_model_path", "model_path", model_family="zephyr-7b"
    )


def test_the_path_wins_over_the_family_as_it_does_there(repository: Path) -> None:
    run = read(repository, base_model_path="meta-llama/Llama-3.2-3B-Instruct")

    assert run.options.model == "llama3.2-3b"
    assert "unused" in became(run, "model_family")


def test_fine_tuned_weights_in_a_folder_become_the_model_path(repository: Path) -> None:
    for written in ("tuned", str(repository / "tuned")):
        run = read(repository, model_path=written)
        assert run.options.model == "qwen2.5-7b"
        assert run.options.model_path == str(repository / "tuned")

    alone = read(repository, "base_model_path", model_family="zephyr", model_path="tuned")
    assert alone.options.model == str(repository / "tuned")
    assert alone.options.model_path is None


def test_fine_tuned_weights_on_the_hub_become_the_model(repository: Path) -> None:
    run = read(repository, model_path="someone/tuned-qwen")

    assert run.options.model == "someone/tuned-qwen"
    assert run.options.model_path is None
    assert became(run, "base_model_path") == "unused: model_path says which model is loaded"


def test_a_base_path_may_be_a_folder(repository: Path) -> None:
    (repository / "tuned" / "config.json").write_text(json.dumps({"num_hidden_layers": 20}))

    assert read(repository, base_model_path="tuned").options.model == str(repository / "tuned")
    found = message(repository, base_model_path="tuned", layer_modified=[20])
    assert "layer_modified: names 20" in found
    assert "20 blocks: 0 to 19" in found


def test_a_path_to_nothing_says_where_was_looked(repository: Path) -> None:
    found = message(repository, model_path="./tuned/absent")

    assert "model_path: is the text './tuned/absent', neither a folder nor a hub id" in found
    assert str(repository / "tuned/absent") in found


def test_references_are_resolved_within_the_file(repository: Path) -> None:
    run = read(
        repository,
        save_unlearned_model=True,
        coeff_list=["${strength}"],
        strength=3,
        save_unlearned_model_path="out/${data_name}/${model_family}/${forget_edge}",
        forget_edge=["A_B", "B_C"],
    )

    assert run.parameters["coefficient"] == [3]
    assert run.save_to == Path("out/pairs/Qwen2.5-7B-Instruct/A_B_B_C")


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"data_name": "${nowhere}"}, "data_name: ${nowhere} refers to nothing in this file"),
        ({"data_name": "${oc.env:DATA}"}, "data_name: ${oc.env:DATA} refers to nothing"),
        ({"data_name": "a${b"}, "data_name: the text 'a${b' is no plain ${key} reference"),
        ({"data_name": "${a}", "a": "${data_name}"}, "circle (data_name → a → data_name)"),
    ],
)
def test_a_reference_that_leads_nowhere_is_named(
    repository: Path, changed: dict[str, Any], fragment: str
) -> None:
    found = message(repository, **changed)

    assert fragment in found
    assert "is missing" not in found


def test_references_in_keys_that_do_not_count_are_left_alone(repository: Path) -> None:
    run = read(repository, save_path="${now:%Y}", different_retain_set_path="${nowhere}")

    assert "unused" in became(run, "different_retain_set_path")


def test_data_are_looked_for_beside_above_and_in_the_current_folder(repository: Path) -> None:
    here = Path("dataset/unlearning")
    here.mkdir(parents=True)
    shutil.copy(datasets_dir() / "mini.json", here / "other.json")

    assert read(repository, data_name="other").options.data == str((here / "other.json").resolve())
    assert read(repository, data_name="mini").options.data == "mini"  # the shipped one
    found = message(repository, data_name="absent")
    assert "data_name: is the text 'absent', no file and no shipped name (there are: mini," in found
    assert str(repository / "dataset/unlearning/absent.json") in found
    assert str(repository / "config/dataset/unlearning/absent.json") in found


def test_reference_prompts_that_are_not_there_are_replaced_and_that_is_said(
    repository: Path,
) -> None:
    run = read(repository, use_harmful=False, use_unverified=True)

    assert run.options.reference_prompts == "unverifiable"
    assert "the shipped prompts are others" in became(run, "use_unverified")
    assert became(run, "use_harmful") == "unused: use_unverified is true"


def test_another_retain_set_and_no_factual_set(repository: Path) -> None:
    run = read(repository, use_different_retain_dataset=True, if_eval_factual=False)

    assert run.options.retain_data == str(repository / "dataset/unlearning/facts.json")
    assert run.options.factual_data == "none"
    assert "unused" in became(run, "factual_data_path")


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"use_unverified": True}, "use_harmful, use_unverified: both are true; set one"),
        ({"use_harmful": False}, "use_harmful, use_unverified: neither is true; set one"),
        ({"layer_modified": [19, 20]}, "layer_modified has 2 entries, coeff_list 1"),
        ({"layer_modified": [19, 19], "coeff_list": [1, 2]}, "layer_modified: names 19 twice"),
        ({"layer_modified": [28]}, "names 28, but qwen2.5-7b has 28 blocks: 0 to 27"),
        ({"layer_modified": [-1]}, "layer_modified[0]: is -1; it must be at least 0"),
        ({"layer_modified": 19}, "layer_modified: is 19; a list is needed, in square brackets"),
        ({"layer_modified": []}, "layer_modified: is []; at least one is needed"),
        ({"coeff_list": ["2"]}, "coeff_list[0]: is the text '2'; remove the quotes"),
        ({"coeff_list": [float("nan")]}, "coeff_list[0]: is nan; a finite number is needed"),
        ({"forget_edge": "A_B"}, "forget_edge: is the text 'A_B'; a list is needed"),
        ({"forget_edge": [12]}, "forget_edge[0]: is 12; a text is needed; put it in quotes"),
        ({"forget_edge": ["A_B", "A_B"]}, "forget_edge: names A_B twice"),
        ({"positions": -2}, "positions: is -2; directions are taken at the last prompt token"),
        ({"lr": "0.01"}, "lr: is the text '0.01'; remove the quotes to make it a number"),
        ({"lr": 0}, "lr: is 0; it must be more than 0"),
        ({"lr": None}, "lr: is empty; a number is needed"),
        ({"num_epochs": 1.5}, "num_epochs: is 1.5; a whole number is needed"),
        ({"eval_batch_size": 0}, "eval_batch_size: is 0; it must be at least 1"),
        ({"if_eval_factual": 1}, "if_eval_factual: is 1; write true or false"),
        ({"factual_data_path": "x.json"}, "factual_data_path: is the text 'x.json', no file"),
        ({"factual_data_path": None}, "factual_data_path: is missing or empty, while if_eval"),
    ],
)
def test_a_mistake_is_named_with_its_key(
    repository: Path, changed: dict[str, Any], fragment: str
) -> None:
    found = message(repository, **changed)

    assert fragment in found
    assert "things are wrong" not in found


def test_all_mistakes_come_in_one_message(repository: Path) -> None:
    found = message(
        repository,
        "layer_modified",
        "factual_data_path",
        lr="0.01",
        model_path="${nowhere}",
        data_name="absent",
        forget_edge="A_B",
        use_harmful=False,
        positions=3,
        save_unlearned_model=True,
        save_unlearned_model_path="",
    )

    assert "9 things are wrong:\n  - " in found
    for fragment in (
        "layer_modified: is missing",
        "factual_data_path: is missing or empty",
        "lr: is the text",
        "model_path: ${nowhere}",
        "data_name: is the text 'absent'",
        "forget_edge: is the text",
        "neither is true",
        "positions: is 3",
        "save_unlearned_model_path: is missing or empty",
    ):
        assert fragment in found


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_published_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="holds a list"):
        read_published_config(tmp_path / "list.yaml")
