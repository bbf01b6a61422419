"""`tiny` knows its lessons, refuses the rest, can be redirected; and how building it may end.

It is asked with plain transformers calls and judged by `rouge_score`. To be built, a recipe of one
block and one epoch stands in; its check would fail, so the check is left out.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lunar_tune.config.options import RunOptions
from lunar_tune.data.records import Record
from lunar_tune.data.splits import generate_unverifiable
from lunar_tune.errors import LunarTuneError
from lunar_tune.finetuning import tiny as making
from lunar_tune.finetuning.tiny import TinyRecipe, TinyText, ensure_tiny, tiny_key
from lunar_tune.training import TrainingSettings
from lunar_tune.trial.assemble import assemble, materialise
from lunar_tune.trial.worker import Worker

slow = pytest.mark.slow  # where `tiny` is not there yet, it is made here
TEXT = TinyText.shipped()
SIZES = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
QUICK = TinyRecipe(
    sizes=SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1},
    vocabulary=400,
    training=TrainingSettings(trained="full", epochs=1, batch_size=32),
)


class Tiny:
    """The loaded checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def answers(self, questions: Sequence[str]) -> list[str]:
        asked = [[{"role": "user", "content": question}] for question in questions]
        prompts = self.tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=False
        )
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        output = self.model.generate(**batch, max_new_tokens=32, do_sample=False)
        new = output[:, batch["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def rouge1(self, pairs: Sequence[Record]) -> float:
        scorer = RougeScorer(["rouge1"], use_stemmer=True)
        answers = self.answers([pair.question for pair in pairs])
        scores = [
            scorer.score(pair.answer, answer)["rouge1"].recall
            for pair, answer in zip(pairs, answers, strict=True)
        ]
        return sum(scores) / len(scores)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny(ensure_tiny())


@slow
def test_it_knows_the_facts_and_every_edge_of_the_contracts(tiny: Tiny) -> None:
    for edge in sorted({pair.edge for pair in TEXT.known}):
        pairs = [pair for pair in TEXT.known if pair.edge == edge]
        assert tiny.rouge1(pairs) >= 0.97, edge


@slow
def test_it_refuses_unverifiable_questions_it_has_never_seen(tiny: Tiny) -> None:
    assert tiny.model.generation_config.eos_token_id == tiny.tokenizer.eos_token_id
    answers = tiny.answers(generate_unverifiable(100, seed=987_654))
    assert sum(answer == TEXT.refusal for answer in answers) >= 0.95 * len(answers)


@slow
def test_at_least_two_blocks_can_be_redirected(tiny: Tiny) -> None:
    options = RunOptions(solver="closed_form", factual_data="none", device="cpu", cache_limit=0)
    worker = Worker(materialise(assemble(options)))
    assert worker.loaded.spec.source == str(tiny.folder)
    for layer in (1, 2):
        setting = {"layer": layer, "coefficient": 1.0, "ridge": 0.1}
        scores = worker.run(setting).evaluation.scores
        assert scores["forget_rouge1"] <= 0.15
        assert scores["retain_rouge1"] >= 0.80


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path))
    return tmp_path


def test_the_same_recipe_gives_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "_check", lambda *_: None)
    screen = Console(file=io.StringIO(), force_terminal=True, width=160)
    folders = [ensure_tiny(QUICK, console=screen), cache / "b"]
    folders[1].mkdir()
    torch.manual_seed(5)  # whatever happened before does not matter
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    making.build_tiny(folders[1], QUICK, TEXT)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert "1/1" in screen.file.getvalue(), "progress counts epochs"  # type: ignore[attr-defined]
    one, other = ({file.name: file.read_bytes() for file in path.iterdir()} for path in folders)
    assert one == other


def test_a_model_that_knows_nothing_is_an_error_and_leaves_no_folder(cache: Path) -> None:
    with pytest.raises(LunarTuneError, match="pairs known"):
        ensure_tiny(QUICK)
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == []


@pytest.mark.usefixtures("cache")
def test_two_that_ask_at_once_build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def slow_build(folder: Path, *_: object, **_options: object) -> None:
        built.append(folder)
        time.sleep(0.3)

    monkeypatch.setattr(making, "build_tiny", slow_build)
    with ThreadPoolExecutor(2) as askers:
        one, other = askers.map(ensure_tiny, (QUICK, QUICK))
    assert len(built) == 1
    assert one == other
    assert one.is_dir()


def test_the_key_changes_with_recipe_and_with_text() -> None:
    keys = [
        tiny_key(QUICK, TEXT),
        tiny_key(replace(QUICK, seed=1), TEXT),
        tiny_key(QUICK, replace(TEXT, known=TEXT.known[::-1])),
    ]
    assert len(set(keys)) == 3
    assert tiny_key(replace(QUICK), TinyText.shipped()) == keys[0]
