"""The `tiny` model knows its lessons, refuses the rest, and can be redirected in several blocks.

It is asked with plain transformers calls and judged by `rouge_score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lunar_tune.config.options import RunOptions
from lunar_tune.data.records import Record
from lunar_tune.data.splits import generate_unverifiable
from lunar_tune.finetuning.tiny import TinyText, ensure_tiny
from lunar_tune.trial.assemble import assemble, materialise
from lunar_tune.trial.worker import Worker

pytestmark = pytest.mark.slow  # where `tiny` is not there yet, it is made here
TEXT = TinyText.shipped()


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


def test_it_knows_the_facts_and_every_edge_of_the_contracts(tiny: Tiny) -> None:
    for edge in sorted({pair.edge for pair in TEXT.known}):
        pairs = [pair for pair in TEXT.known if pair.edge == edge]
        assert tiny.rouge1(pairs) >= 0.97, edge


def test_it_refuses_unverifiable_questions_it_has_never_seen(tiny: Tiny) -> None:
    assert tiny.model.generation_config.eos_token_id == tiny.tokenizer.eos_token_id
    answers = tiny.answers(generate_unverifiable(100, seed=987_654))
    assert sum(answer == TEXT.refusal for answer in answers) >= 0.95 * len(answers)


def test_at_least_two_blocks_can_be_redirected(tiny: Tiny) -> None:
    options = RunOptions(solver="closed_form", factual_data="none", device="cpu", cache_limit=0)
    worker = Worker(materialise(assemble(options)))
    assert worker.loaded.spec.source == str(tiny.folder)
    for layer in (1, 2):
        setting = {"layer": layer, "coefficient": 1.0, "ridge": 0.1}
        scores = worker.run(setting).evaluation.scores
        assert scores["forget_rouge1"] <= 0.15
        assert scores["retain_rouge1"] >= 0.80
