"""The command that carries a search's winner away: every form, for every kind of method.

Forms are loaded in a fresh process that cannot import the package, by the lines of their cards.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import command_lines
import pytest
import torch
from command_lines import finish, small_run, start, without_ray
from made_search import NOWHERE, made_search
from random_models import BIASED
from rouge_score.rouge_scorer import RougeScorer
from trial_specs import write_records

from lunar_tune.cli.export import export as COMMAND
from lunar_tune.config.options import NONE, RunOptions
from lunar_tune.errors import Problems
from lunar_tune.export.export_job import assemble_again
from lunar_tune.models.catalog import ModelSpec, read_lineage
from lunar_tune.models.loading import load_model
from lunar_tune.study.folder import Folder, answers_note, read_answers, write_answers
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import keep_note
from lunar_tune.trial.worker import Worker
from lunar_tune.yaml_files import read_yaml

refused = partial(command_lines.refused, COMMAND)


SETTING = {"layer": 1, "coefficient": 2.0, "ridge": 0.01}
# What a machine without lunar-tune does: the card's lines, greedy decoding by transformers.
READER = """
import json, sys
sys.modules["lunar_tune"] = None
import torch
from transformers import AutoTokenizer
torch.set_num_threads(1)
questions, words, *cards = sys.argv[1:]
asked = json.load(open(questions))
tokenizer = AutoTokenizer.from_pretrained(words)
batch = tokenizer.apply_chat_template(
    [[{"role": "user", "content": text}] for text in asked], add_generation_prompt=True,
    padding=True, tokenizer_kwargs={"padding_side": "left"}, return_tensors="pt", return_dict=True,
)
for card in cards:
    exec(open(card).read().split("```python")[1].split("```")[0])
    with torch.inference_mode():
        new = model.eval().generate(**batch, max_new_tokens=48, do_sample=False)
    new = new[:, batch["input_ids"].shape[1]:]
    print(json.dumps(tokenizer.batch_decode(new, skip_special_tokens=True)))
"""


def exported(search: Path, form: str, *more: object) -> tuple[Path, dict[str, Any]]:
    """Export into a folder beside the search; return it with its export.json."""
    output = search.parent / f"{search.name}-{form}-{len(list(search.parent.iterdir()))}"
    result = without_ray(COMMAND, search, "--format", form, "--save", output, *more)
    assert result.exit_code == 0, result.output
    return output, json.loads((output / "export.json").read_text())


PUBLISHED = "lunar_tune.trial.evaluator.PUBLISHED_MAX_NEW_TOKENS"
BUDGET = 48
"""Tokens of a full evaluation here: enough for every answer of the tiny model that ends at all."""
RANDOM_BUDGET = 12
"""The same for random models, which never end."""


@pytest.fixture(scope="module", autouse=True)
def _short_answers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(PUBLISHED, BUDGET)
        yield


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a search of the tiny model, which knows its data."""
    rows = {"max_new_tokens": None, "evaluation_rows": 8, "factual_data": NONE}
    options = RunOptions(solver="closed_form", device="cpu", **rows)
    return made_search(tmp_path_factory.mktemp("known"), "tiny", options, SETTING, floor=0.5)


@pytest.fixture(scope="module")
def carried(known: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the tiny model's exports by form."""
    return {form: exported(known, form) for form in ("checkpoint", "adapter")}


@pytest.fixture
def random_search(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path]:
    """Return a factory of searches on a random model, each in a folder of its own."""
    monkeypatch.setattr(PUBLISHED, RANDOM_BUDGET)

    def make(parameters: dict[str, Any], **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("random")
        run = small_run(checkpoint("llama", **BIASED), folder, **({"max_new_tokens": 6} | options))
        return made_search(folder, "found", run, parameters)

    return make


def test_a_fresh_process_without_the_package_gets_the_scores_that_the_search_reported(
    known: Path, carried: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    """The cards' lines load each form, transformers generates, rouge-score counts."""
    rows = read_answers(Folder(known).answers(0, full=True))
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([row.question for row in rows]))
    cards = []
    for form, (folder, document) in carried.items():
        assert document["proven"] is True
        assert document["n_rows"] == 8 + 8
        assert form == "adapter" or document["differing_rows"] == 0
        card = (folder / "README.md").read_text()
        base = Path(document["base"])
        assert (f'base = "path/to/{base.name}"' in card) == (form != "checkpoint")
        cards.append(tmp_path / f"{form}.md")
        cards[-1].write_text(card.replace(f"path/to/{base.name}", str(base)))
    words, place = carried["checkpoint"][0], known.parent
    program = [sys.executable, "-P", "-c", READER, str(questions), str(words), *map(str, cards)]
    done = finish(start(program, cwd=place, PYTHONPATH=""))
    assert done.returncode == 0, done.stderr
    confirmed = read_yaml(known / "best.yaml")["confirmed"]["scores"]
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    for line in done.stdout.splitlines()[-2:]:
        for name in ("forget", "retain"):
            recalls = [
                scorer.score(row.truth, answer)["rouge1"].recall
                for row, answer in zip(rows, json.loads(line), strict=True)
                if row.set_name == name
            ]
            score = pytest.approx(confirmed[f"{name}_rouge1"], abs=0.01)
            assert math.fsum(recalls) / len(recalls) == score
    assert confirmed["forget_rouge1"] < 0.2
    assert confirmed["retain_rouge1"] > 0.5


def test_a_checkpoint_says_where_it_comes_from_and_can_be_searched_on(
    carried: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    folder, document = carried["checkpoint"]
    lineage = read_lineage(folder)
    assert lineage is not None
    assert lineage.unlearned["parameters"] == SETTING
    assert "A_B of mini unlearned (lunar)" in lineage.summary
    base = ModelSpec(name="tiny", source=document["base"], device="cpu")
    again = load_model(dataclasses.replace(base, weights=str(folder))).model  # as --model-path does
    different = [
        name
        for name, weight in load_model(base).model.named_parameters()
        if not torch.equal(weight, again.get_parameter(name))
    ]
    assert different == ["model.layers.1.mlp.down_proj.weight"]


def test_a_card_shows_scores_setting_and_digests_and_no_text_of_the_data(
    known: Path, carried: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    folder, document = carried["adapter"]
    card = (folder / "README.md").read_text()
    front = read_yaml(card.split("---")[1])
    assert "unlearning" in front["tags"]
    assert "base_model" not in front  # a folder of this machine is no model of the hub
    assert str(Path(document["base"]).parent) not in card
    for said in (
        f"`{Path(document['base']).name}`, a local folder",
        *("closed_form", "coefficient 2.0", f"{BUDGET} tokens", "* feasible: yes"),
        document["base_fingerprint"],
        *document["data_digests"].values(),
    ):
        assert said in card
    for row in read_answers(Folder(known).answers(0, full=True)):
        assert row.question not in card
        assert len(row.truth) < 8 or row.truth not in card  # a number may be a version as well


LUNAR = {"layer": 1, "coefficient": 2.0, "learning_rate": 0.01}
GRADIENT = {"learning_rate": 1e-3}


def _gradient(trained: str) -> dict[str, Any]:
    return {"method": "ga", "fix": (f"trained={trained}", "epochs=2", "batch_size=2")}


EPOCHS = {"fix": ("epochs=2",)}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str, int | None]] = {
    "closed_form": (SETTING, {"solver": "closed_form"}, "adapter", 1),
    "adamw": (LUNAR, {"solver": "adamw", **EPOCHS}, "adapter:32", 32),
    "lora": (LUNAR, {"solver": "lora", **EPOCHS}, "adapter", 8),
    "ga-lora": (GRADIENT, _gradient("lora"), "checkpoint", None),
    "ga-full": ({"learning_rate": 1e-4}, _gradient("full"), "checkpoint", None),
    "bfloat16": (LUNAR, {"solver": "adamw", "dtype": "bfloat16", **EPOCHS}, "checkpoint", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_method_is_proven(random_search: Callable[..., Path], kind: str) -> None:
    parameters, options, form, rank = KINDS[kind]
    search = random_search(parameters, **({"dtype": "float32"} | options))
    folder, document = exported(search, form)
    assert document["parameters"] == parameters
    assert document["dtype"] == options.get("dtype", "float32")
    if rank is not None:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert set(document["ranks"].values()) == {rank} == {config["r"]}
        assert document["relative_error"] < 1e-6  # of adamw's 32 of 32 ranks
        assert config["base_model_name_or_path"] == document["base"]
    elif kind != "ga-lora":  # merging rounds
        assert document["differing_rows_of_the_run"] == 0
    if kind == "ga-full":
        message = refused(search, "--format", "adapter", "--save", search.parent / "refused")
        assert "trains whole weights" in message


def test_an_adapter_that_belongs_on_a_merged_adapter_is_refused(
    random_search: Callable[..., Path], tmp_path: Path
) -> None:
    """The base would be a model and an adapter; only a whole checkpoint can be loaded by itself."""
    adapter, document = exported(random_search(GRADIENT, **_gradient("lora")), "adapter")
    assert set(document["ranks"].values()) == {8}
    search = random_search(SETTING, solver="closed_form", model_path=str(adapter))
    message = refused(search, "--format", "adapter", "--save", tmp_path / "adapter")
    assert "use --format checkpoint" in message
    exported(search, "checkpoint")


def test_a_trial_that_is_not_the_best_is_compared_on_the_rows_that_it_has(
    tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    """Bounded evaluation ends at the first chunk: a random model misses any floor."""
    data = write_records(tmp_path / "many.json", {"A_B": 3, "B_C": 40})
    options = small_run(checkpoint("qwen2"), tmp_path, data=data, solver="closed_form")
    search = made_search(tmp_path, "s", options, SETTING, floor=0.9, confirmed=False)
    asked = len(read_answers(Folder(search).answers(0)))
    assert asked < 43
    folder, document = exported(search, "checkpoint", "--trial", 0)
    assert (document["n_rows"], document["differing_rows"]) == (asked, 0)
    assert document["max_new_tokens"] == 4
    of = asked - 3, 40
    told = document["retain_rows"], document["n_retain"], document["retain_exact"]
    assert told == (*of, False)
    missed = "retain ROUGE-1 of at least 0.9"
    assert (document["feasible"], document["missed"]) == (False, missed)
    card = (folder / "README.md").read_text()
    assert f"* feasible: no, it misses {missed}" in card
    assert f"* ≈: an estimate, mean of {of[0]} of {of[1]} questions to keep" in card
    assert card.count("| ≈ ") == 2 * 2  # retain and deviation score, as reported and as loaded
    assert "name a trial by its number (0)" in refused(search, "--save", tmp_path / "none")


def test_what_a_search_asked_for_longer_is_asked_for_as_long(
    tmp_path: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where it wants to know of the answers to forget whether they decline."""
    monkeypatch.setattr("lunar_tune.trial.evaluator.READ_TOKENS", 80)
    wanted = {"max_new_tokens": None, "metrics": ("forget_refused", "forget_mrr")}
    options = small_run(checkpoint("qwen2"), tmp_path, solver="closed_form", **wanted)
    path = made_search(tmp_path, "s", options, SETTING, floor=0.9, confirmed=False)
    search = StoredSearch.read(path)
    spec = assemble_again(search, problems := Problems())
    assert (spec.metrics, problems.messages) == (("forget_refused",), [])
    again = Worker(spec).run(SETTING).evaluation.rows
    before = [row.answer for row in search.answer_rows(0) if row.set_name == "forget"]
    assert [row.answer for row in again if row.set_name == "forget"] == before


def test_a_search_without_texts_is_proven_by_the_scores_of_its_rows(
    random_search: Callable[..., Path],
) -> None:
    search = random_search(SETTING, solver="closed_form", text=False)
    folder, document = exported(search, "checkpoint")
    assert document["proven"] is True
    assert (document["n_rows"], document["differing_rows"]) == (9, 0)
    assert document["compared"] == "ROUGE-1 and ROUGE-L of each row"
    card = (folder / "README.md").read_text()
    assert "the search kept no texts" in card
    assert "≈" not in card, "all questions were asked"


def test_what_does_not_give_the_reported_answers_is_kept_and_called_unproven(
    random_search: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = random_search(SETTING, solver="closed_form")
    file = Folder(search).answers(0, full=True)
    rows = read_answers(file)
    rows[2] = dataclasses.replace(rows[2], answer="something else")
    keep_note(Folder(search).journal, answers_note(file), write_answers(file, rows, ()))
    (tmp_path / "unlearned").mkdir()
    monkeypatch.chdir(tmp_path / "unlearned")
    result = without_ray(COMMAND, search, "--format", "checkpoint", "--save", ".")
    assert result.exit_code == 1
    assert "1 of 9 answers differ" in result.stderr
    document = json.loads(Path("export.json").read_text())
    assert (document["proven"], document["differing_rows"]) == (False, 1)
    card = Path("README.md").read_text()
    assert "Not proven" in card
    assert 'from_pretrained("unlearned"' in card, "the folder that was called here"


def test_mistakes_are_said_together_before_anything_is_loaded(
    random_search: Callable[..., Path], tmp_path: Path
) -> None:
    plain = random_search(SETTING, solver="closed_form")
    exact = refused(plain, "--format", "adapter:2", "--save", tmp_path / "a")
    assert "adapter:2: the adapter of --method lunar (closed_form) is exact" in exact
    for form in ("checkpoint:2", "adapter:0", "adapter:x", "adapter:"):
        said = f"--format {form}: must be checkpoint, adapter or adapter:RANK"
        assert said in refused(plain, "--format", form, "--save", tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    pairs, prompts = plain.parent / "pairs.json", plain.parent / "prompts.txt"
    pairs.write_text(pairs.read_text().replace("Kettle 1 of A_B", "Kettle 9 of A_B"))
    prompts.write_text("What is never?")
    message = refused(
        *(plain, "--format", "gguf", "--save", tmp_path / "full", "--trial", 5),
        *("--json", tmp_path, "--register", "a/b", "--tracking-uri", NOWHERE),
    )
    for said in (
        "--format gguf: must be checkpoint, adapter or adapter:RANK, RANK at least 1.",
        "the folder is not empty",
        "there is no such trial",
        "is a folder, not a file",
        "--register a/b: must not be empty",
        f"the MLflow store {NOWHERE} cannot be used",
        f"{pairs}: the data have changed since the search: the forget set is another one",
        f"{prompts}: the data have changed since the search: the reference prompts are others",
    ):
        assert said in message
