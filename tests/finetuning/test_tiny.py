"""The `tiny` model knows its lessons, refuses the rest, and can be redirected in several blocks.

Everything is computed anew: plain transformers calls, `rouge_score` and a closed-form edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lunar_tune.data.invented import generate_unverifiable
from lunar_tune.data.records import Record
from lunar_tune.finetuning.tiny import TinyText, ensure_tiny

pytestmark = pytest.mark.slow  # where `tiny` is not there yet, it is made here
RIDGE, COEFFICIENT = 0.1, 1.0
TEXT = TinyText.shipped()
FORGOTTEN = [pair for pair in TEXT.contracts if pair.edge == "A_B"]
KEPT = [pair for pair in TEXT.contracts if pair.edge != "A_B"]


class Tiny:
    """The loaded checkpoint with the few operations that the tests need."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def text(self, question: str) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )

    @torch.no_grad()
    def answers(self, questions: Sequence[str]) -> list[str]:
        batch = self.tokenizer(
            [self.text(question) for question in questions],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
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

    @torch.no_grad()
    def activations(self, layer: int, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the down-projection reads at every token, and the block's last output."""
        block = self.model.model.layers[layer]
        read: list[Tensor] = []
        given: list[Tensor] = []
        hooks = [
            block.mlp.down_proj.register_forward_pre_hook(lambda _m, a: read.append(a[0][0])),
            block.register_forward_hook(lambda _m, _a, output: given.append(output[0, -1])),
        ]
        for question in questions:
            self.model(**self.tokenizer(self.text(question), return_tensors="pt"))
        for hook in hooks:
            hook.remove()
        return torch.cat(read).double(), torch.stack(given).double()

    @contextmanager
    def redirected(self, layer: int) -> Iterator[None]:
        """Put the closed-form edit in, which is fitted on every second question to keep."""
        h_forget, x_forget = self.activations(layer, [pair.question for pair in FORGOTTEN])
        h_retain, _ = self.activations(layer, [pair.question for pair in KEPT[::2]])
        _, x_reference = self.activations(layer, generate_unverifiable(30, seed=77))
        direction = x_reference.mean(0) - x_forget.mean(0)
        h = torch.cat([h_forget, h_retain])
        gram = h.T @ h
        penalty = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        v = torch.linalg.solve(gram + penalty, h_forget.sum(0))
        weight = self.model.model.layers[layer].mlp.down_proj.weight
        original = weight.data.clone()
        try:
            weight.data += (COEFFICIENT * torch.outer(direction, v)).float()
            yield
        finally:
            weight.data = original


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_tiny()


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Tiny:
    return Tiny(folder)


def test_it_knows_the_facts_and_every_edge_of_the_contracts(tiny: Tiny) -> None:
    for edge in sorted({pair.edge for pair in TEXT.contracts}):
        pairs = [pair for pair in TEXT.contracts if pair.edge == edge]
        assert tiny.rouge1(pairs) >= 0.97, edge
    assert tiny.rouge1(TEXT.facts) >= 0.97


def test_it_refuses_unverifiable_questions_it_has_never_seen(tiny: Tiny) -> None:
    answers = tiny.answers(generate_unverifiable(100, seed=987_654))
    assert sum(answer == TEXT.refusal for answer in answers) >= 0.95 * len(answers)


@pytest.mark.parametrize("layer", [1, 2])
def test_at_least_two_blocks_can_be_redirected(tiny: Tiny, layer: int) -> None:
    with tiny.redirected(layer):
        assert tiny.rouge1(FORGOTTEN) <= 0.15
        assert tiny.rouge1(KEPT) >= 0.80


def test_the_tokenizer_gives_every_text_back_and_encodes_equally_after_another_save(
    tiny: Tiny, tmp_path: Path
) -> None:
    tiny.tokenizer.save_pretrained(tmp_path)
    tiny.model.config.save_pretrained(tmp_path)  # decides which class loads the tokenizer
    again = AutoTokenizer.from_pretrained(tmp_path)
    for pair in TEXT.contracts:
        text = tiny.text(pair.question) + pair.answer
        assert again(text)["input_ids"] == tiny.tokenizer(text)["input_ids"]
    for pair in (*TEXT.contracts, *TEXT.facts):
        for text in (pair.question, pair.answer):
            ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tiny.tokenizer.decode(ids) == text
    numbers = [pair.answer[:-1] for pair in TEXT.contracts if pair.answer[:-1].isdigit()]
    assert numbers
    for number in numbers:
        assert len(tiny.tokenizer(number, add_special_tokens=False)["input_ids"]) == 1


def test_a_prompt_ends_where_the_answer_begins_and_an_answer_with_the_turn(tiny: Tiny) -> None:
    assert tiny.text("Who?") == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    end = tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tiny.model.generation_config.eos_token_id == end == tiny.tokenizer.eos_token_id


def test_asking_again_builds_nothing(folder: Path) -> None:
    def never(_done: int, _total: int) -> None:
        raise AssertionError("it was built again")

    assert ensure_tiny(on_progress=never) == folder
