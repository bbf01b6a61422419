"""The published forget.yaml: every key finds its place or a reason, mistakes come at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lunar_tune.config.options import RunOptions
from lunar_tune.errors import InputError
from lunar_tune.files import shipped_folder
from lunar_tune.methods.lunar import LunarMethod
from lunar_tune.trial.assemble import assemble, configured
from lunar_tune.trial.published_config import read_published_config
from lunar_tune.yaml_files import write_yaml

# The keys of the published file, with values of our own.
KEYS: dict[str, Any] = {
    "model_family": "Qwen2.5-7B-Instruct",
    "base_model_path": "Qwen/Qwen2.5-7B-Instruct",
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
    **{"n_train": 128, "n_test": 100, "n_val": 32, "max_new_tokens": 64},
    "eval_batch_size": 8,
    "eval_generation_max_length": 512,
    "eval_generation_max_new_tokens": 300,
    "if_eval_factual": True,
    "factual_data_path": "dataset/unlearning/facts.json",
    "compute_es_score": True,
    "save_unlearned_model": False,
    "save_unlearned_model_path": "out/${data_name}/${forget_edge}",
    **{"save_folder": "x", "save_path": "runs/${save_folder}"},
}


class Repository:
    """A folder laid out as the published repository; the current folder is elsewhere."""

    def __init__(self, root: Path) -> None:
        self.root, self.config = root, root / "config" / "forget.yaml"
        for folder in ("config", "dataset/unlearning", "dataset/splits", "tuned"):
            (root / folder).mkdir(parents=True)
        shutil.copy(shipped_folder("datasets") / "mini.json", self.file("pairs"))
        shutil.copy(shipped_folder("datasets") / "factual.json", self.file("facts"))
        self.harmful = root / "dataset/splits/harmful.json"
        shutil.copy(shipped_folder("datasets") / "harmful.json", self.harmful)

    def file(self, name: str) -> str:
        return str(self.root / f"dataset/unlearning/{name}.json")

    def read_all(self, *without: str, **changed: Any) -> tuple[RunOptions, Path | None, list[str]]:
        """Read the file with some keys left out and some changed."""
        content = {key: value for key, value in (KEYS | changed).items() if key not in without}
        self.config.write_text(write_yaml(content), encoding="utf-8")
        return read_published_config(self.config)

    def read(self, *without: str, **changed: Any) -> RunOptions:
        return self.read_all(*without, **changed)[0]

    def message(self, *without: str, **changed: Any) -> str:
        with pytest.raises(InputError) as caught:
            self.read(*without, **changed)
        assert str(caught.value).startswith(str(self.config))
        return str(caught.value)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    made = Repository(tmp_path / "repository")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return made


def test_every_deciding_key_becomes_an_option(repository: Repository) -> None:
    options, save_to, ignored = repository.read_all()
    assert (options.model, options.model_path) == ("qwen2.5-7b", None)
    assert (options.forget_edge, options.retain_data) == (("A_B",), None)
    assert (options.data, options.factual_data) == tuple(map(repository.file, ("pairs", "facts")))
    assert options.reference_prompts == str(repository.harmful)
    assert (options.max_new_tokens, options.evaluation_rows) == (300, 200)
    assert (options.chat_template, options.dtype, save_to) == ("published", "bfloat16", None)
    method, parameters = configured(options)
    assert isinstance(method, LunarMethod)
    settings = method.settings
    assert (settings.solver, settings.positions, settings.epochs) == ("adamw", "all", 7)
    assert settings.retain_points is None
    assert settings.master_dtype == "bfloat16"
    assert settings.decay == 0.01  # torch's default, which that code does not change
    assert parameters == {"layer": 19, "coefficient": 2.5, "learning_rate": 0.004}
    assert ignored == [
        *("n_train", "n_test", "n_val", "max_new_tokens", "eval_batch_size"),
        *("eval_generation_max_length", "compute_es_score", "save_folder", "save_path"),
    ]


def test_other_sets_and_values_of_keys_that_are_absent(repository: Repository) -> None:
    absent = ("num_epochs", "eval_generation_max_new_tokens", "eval_batch_size", "positions")
    other = {"use_different_retain_dataset": True, "if_eval_factual": False}
    options = repository.read(*absent, use_harmful=False, use_unverified=True, **other)
    assert (options.retain_data, options.factual_data) == (repository.file("facts"), "none")
    assert "epochs=20" in options.fix
    assert options.max_new_tokens == 512
    assert options.reference_prompts == "unverifiable", "no file of them is there"
    assert {record.edge for record in assemble(options).data.forget} == {"A_B"}


@pytest.mark.parametrize(
    ("family", "template"),  # src/eval_util.py, run_generation: which special tokens it leaves out
    [
        ("llama3-8b-instruct", "published-eval"),
        ("gemma-7b-it", "published-eval"),
        ("llama2-7b-chat", "published"),
        ("Qwen2-7B-Instruct", "published"),
    ],
)
def test_questions_begin_as_that_codes_evaluation_begins_them(
    repository: Repository, family: str, template: str
) -> None:
    assert repository.read(model_family=family).chat_template == template


NO_PATHS = ("base_model_path", "model_path")


def test_a_path_wins_over_the_family_and_a_folder_is_the_model_path(repository: Repository) -> None:
    tuned = str(repository.root / "tuned")
    for without, changed, expected in (
        (NO_PATHS, {"model_family": "LLAMA3-8B-INSTRUCT"}, ("llama3-8b", None)),
        (NO_PATHS, {"model_family": "llama3-8b-base"}, ("llama3-8b-base", None)),  # another
        ((), {"model_family": "zephyr", "base_model_path": "some/zephyr"}, ("some/zephyr", None)),
        ((), {"base_model_path": "tuned"}, (tuned, None)),
        ((), {"model_path": "tuned"}, ("qwen2.5-7b", tuned)),
        (NO_PATHS[:1], {"model_family": "zephyr", "model_path": "tuned"}, (tuned, None)),
        ((), {"model_path": "someone/tuned-qwen"}, ("someone/tuned-qwen", None)),
    ):
        options = repository.read(*without, **changed)
        assert (options.model, options.model_path) == expected


def test_references_are_resolved_within_the_file(repository: Repository) -> None:
    """Model_path refers to base_model_path; what is ignored is not resolved."""
    kept, place = {"save_path": "${now:%Y}"}, "out/${data_name}/${model_family}/${forget_edge}"
    saved = {"save_unlearned_model": True, "save_unlearned_model_path": place}
    options, save_to, _ = repository.read_all(forget_edge=["A_B", "B_C"], **saved, **kept)
    assert options.model == "qwen2.5-7b"
    assert save_to == Path("out/pairs/Qwen2.5-7B-Instruct/A_B_B_C")


def test_data_are_looked_for_beside_and_above(repository: Repository) -> None:
    here = Path("dataset/unlearning/other.json")
    here.parent.mkdir(parents=True)
    shutil.copy(shipped_folder("datasets") / "mini.json", here)
    assert repository.read(data_name="other").data == str(here.resolve())
    assert repository.read(data_name="mini").data == "mini"  # the shipped one
    found = repository.message(data_name="absent")
    assert f"'absent', no file beside or above {repository.config.parent}" in found
    assert "no shipped name (there are: mini," in found


def test_mistakes_of_one_kind_come_in_one_message(repository: Repository) -> None:
    types = repository.message("layer_modified", lr="0.01", forget_edge="A_B", num_epoch=3)
    meaning = repository.message(data_name="absent", use_harmful=False, coeff_list=[1, 2])
    circle = repository.message(data_name="${model_family}", model_family="${data_name}")
    for message, fragments in (
        (types, ("layer_modified: is missing", "lr: is the text", "forget_edge: is the text")),
        (types, ("num_epoch: is unknown. Did you mean 'num_epochs'?",)),
        (meaning, ("data_name: is the text 'absent'", "use_harmful, use_unverified: set one")),
        (meaning, ("layer_modified, coeff_list: give one coefficient for each",)),
        (circle, ("model_family: the text '${data_name}' refers to no key of this file, or in",)),
        (repository.message(forget_edge=["${lr}"]), ("forget_edge: ['${lr}'] refers to no key",)),
    ):
        assert all(fragment in message for fragment in fragments)
    assert "positions: is -2; it should be -1" in repository.message(positions=-2)
    found = repository.message(factual_data_path="x.json")
    assert "factual_data_path: is the text 'x.json', no file" in found
    found = repository.message(save_unlearned_model=True, save_unlearned_model_path="")
    assert "save_unlearned_model_path: is missing or empty" in found
