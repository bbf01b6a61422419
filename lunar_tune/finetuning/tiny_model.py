"""Builds the `tiny` model: trained from scratch on its lessons, checked, saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from lunar_tune.errors import LunarTuneError
from lunar_tune.finetuning.tiny_recipe import TinyRecipe
from lunar_tune.finetuning.tiny_text import Lesson, TinyText
from lunar_tune.finetuning.tiny_tokenizer import answer_ids, chat_prompt, train_tokenizer
from lunar_tune.training.answer_loss import Pair, answer_loss
from lunar_tune.training.gradient_loop import LoopSettings, run_loop

__all__ = ["build_tiny", "new_model"]

_MOST_NEW_TOKENS = 32
_KNOWN, _REFUSED, _CHECKED_REFUSALS = 0.97, 0.95, 100


def build_tiny(
    folder: Path,
    recipe: TinyRecipe,
    text: TinyText,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train the model and save it with its tokenizer into a folder.

    Args:
        folder: Exists and is empty.
        recipe: The numbers.
        text: The lessons.
        on_progress: Called after each epoch with the epochs done and their total.

    Raises:
        LunarTuneError: The trained model does not know what it was taught, or its tokenizer is
            another one after loading.
        DivergenceError: The training diverged.
    """
    with _reproducible(recipe):
        lessons = [*text.known(), *text.refused(recipe.refused_per_epoch, seed=recipe.seed)]
        tokenizer = train_tokenizer(lessons, vocabulary=recipe.vocabulary)
        model = new_model(recipe, tokenizer)
        _train(model, tokenizer, recipe, text, on_progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _check_tokenizer(folder, tokenizer, [*lessons, *text.unseen(_CHECKED_REFUSALS)])
        _check_model(folder, text)


@contextmanager
def _reproducible(recipe: TinyRecipe) -> Iterator[None]:
    """Seed torch, set its threads, hide progress bars; put all of it back afterwards."""
    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(recipe.threads)
            logging.disable_progress_bar()
            torch.manual_seed(recipe.seed)
            yield
        finally:
            torch.set_num_threads(threads)
            if bars:
                logging.enable_progress_bar()


def new_model(recipe: TinyRecipe, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Return an untrained model, drawn from torch's generator."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_key_value_heads,
        max_position_embeddings=512,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: TinyRecipe,
    text: TinyText,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Train on what is to be known and on freshly invented questions; modifies `model`."""

    def encoded(lessons: Sequence[Lesson]) -> list[Pair]:
        return [
            Pair(
                tuple(chat_prompt(tokenizer, lesson.question)),
                tuple(answer_ids(tokenizer, lesson.answer)),
            )
            for lesson in lessons
        ]

    def examples(epoch: int) -> list[Pair]:
        seed = recipe.seed * recipe.epochs + epoch
        return known + encoded(text.refused(recipe.refused_per_epoch, seed=seed))

    def on_epoch(done: int, _loss: float) -> None:
        if on_progress is not None:
            on_progress(done, recipe.epochs)

    known = encoded(text.known())
    settings = LoopSettings(
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        schedule="cosine",
        warmup_share=recipe.warmup_share,
        beta2=recipe.beta2,
        seed=recipe.seed,
    )
    model.train()
    run_loop(
        model.parameters(),
        examples,
        lambda batch: answer_loss(model, model.model, batch),
        settings,
        length_of=len,
        on_epoch=on_epoch,
    )
    model.train(mode=False)


def _left_padded(rows: Sequence[list[int]], value: int) -> Int[Tensor, "batch seq"]:
    seq = max(len(row) for row in rows)
    return torch.tensor([[value] * (seq - len(row)) + row for row in rows])


def _check_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, lessons: Sequence[Lesson]
) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    for lesson in lessons:
        before = chat_prompt(tokenizer, lesson.question) + answer_ids(tokenizer, lesson.answer)
        after = chat_prompt(loaded, lesson.question) + answer_ids(loaded, lesson.answer)
        if before != after:
            raise LunarTuneError(
                f"the tokenizer of `tiny` is another one after loading: {lesson.question!r} was "
                f"{before} and is {after}; report this with your version of transformers"
            )


def _check_model(folder: Path, text: TinyText) -> None:
    """Ask the saved model everything that it was taught, and what it cannot know."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for what, lessons, wanted in (
        ("pairs known", text.known(), _KNOWN),
        ("unseen questions refused", text.unseen(_CHECKED_REFUSALS), _REFUSED),
    ):
        answers = _answers(model, tokenizer, [lesson.question for lesson in lessons])
        right = [a == lesson.answer for a, lesson in zip(answers, lessons, strict=True)]
        share = sum(right) / len(right)
        if share < wanted:
            raise LunarTuneError(
                f"the training of `tiny` failed: {share:.0%} {what}, at least {wanted:.0%} are "
                "needed; report this with your versions of torch and transformers"
            )


@torch.no_grad()
def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]
) -> list[str]:
    """Return greedy answers, all questions in one batch."""
    prompts = [chat_prompt(tokenizer, question) for question in questions]
    ids = _left_padded(prompts, 0)
    mask = _left_padded([[1] * len(prompt) for prompt in prompts], 0)
    # transformers types `generate` for a protocol that its own models do not fulfil.
    output = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, max_new_tokens=_MOST_NEW_TOKENS
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
