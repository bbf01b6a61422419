"""Greedy answers to prompts, computed from the first token on and for any causal model.

Covers: left-padded batches with explicit positions, key-value cache, rows leaving the batch when
they end, all end-of-sequence ids, an optional repetition penalty; the answerer for models whose
attention `answering` cannot go on from.
Does not cover: sampling, beams, scores of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lunar_tune.config.decoding_settings import LEAST_BUDGET, DecodingSettings
from lunar_tune.engine.answer_rules import AnswerRules
from lunar_tune.engine.slot_decoding import until_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lunar_tune.models.loading import LoadedModel

__all__ = ["PlainAnswerer", "generate_tokens", "token_budget"]


# Rows in a batch. On a CPU larger batches win nothing once the weights are read; on a GPU 256
# short rows of a 7B model's cache stay below 10 GiB.
ROWS_PER_BATCH = {"cpu": 192, "cuda": 256}
# Steps between looks at which rows have ended: a look is a synchronisation on a GPU.
STEPS_PER_LOOK = {"cpu": 1, "cuda": 8}


def token_budget(
    settings: DecodingSettings, tokenizer: PreTrainedTokenizerBase, truths: Iterable[str]
) -> int:
    """Return the token budget: the settings' own, or what the true answers call for."""
    if settings.max_new_tokens is not None:
        return settings.max_new_tokens
    ids = tokenizer(list(truths) or [""], add_special_tokens=False)["input_ids"]
    return max(LEAST_BUDGET, 2 * max(len(row) for row in ids))


class PlainAnswerer:
    """Answers rows of prompts plainly, behind the interface of `answering.Answerer`.

    Args:
        loaded: The model, edited or not.
        prompts: Token ids by row.
        settings: Penalty and batch size.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        settings: DecodingSettings,
    ) -> None:
        self._loaded, self._prompts, self._settings = loaded, prompts, settings

    def prepare(self) -> None:
        """Keep nothing."""

    def begin(self, rules: AnswerRules) -> PlainRun:
        """Begin to answer with the model as it is now."""
        return PlainRun(self._loaded, self._prompts, self._settings, rules.max_new_tokens)


class PlainRun:
    """Answers of the model as it is now; nothing is known of an answer before it is decoded."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        settings: DecodingSettings,
        max_new_tokens: int,
    ) -> None:
        self._loaded, self._prompts, self._settings = loaded, prompts, settings
        self._max_new_tokens = max_new_tokens
        self._pending: list[int] = []
        self._answers: dict[int, list[int]] = {}

    def open(self, rows: Sequence[int]) -> Mapping[int, list[int]]:
        """Note what is asked."""
        self._pending += rows
        return {}

    def close(self) -> Mapping[int, list[int]]:
        """Decode what is open; return the answers to all rows opened so far."""
        prompts = [self._prompts[row] for row in self._pending]
        tokens = generate_tokens(
            self._loaded, prompts, self._settings, max_new_tokens=self._max_new_tokens
        )
        self._answers |= dict(zip(self._pending, tokens, strict=True))
        self._pending = []
        return dict(self._answers)


@torch.inference_mode()
def generate_tokens(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: DecodingSettings,
    *,
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the greedy answer to each prompt, cut before its first end-of-sequence token.

    Prompts of similar length share a batch; the answers come in the order of `prompts`.

    Args:
        loaded: The model, edited or not.
        prompts: Token ids of each prompt.
        settings: Penalty and batch size.
        max_new_tokens: Token budget of an answer; `token_budget` resolves the settings' own.
    """
    size = settings.batch_size or ROWS_PER_BATCH.get(loaded.device.type, ROWS_PER_BATCH["cpu"])
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    tokens: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), size):
        rows = by_length[start : start + size]
        batch = _Batch(loaded, [prompts[row] for row in rows], settings, max_new_tokens)
        for row, answer in zip(rows, batch.run(), strict=True):
            tokens[row] = answer
    return tokens


class _Batch:
    """One batch of prompts being answered; rows that have ended are taken out."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        settings: DecodingSettings,
        max_new_tokens: int,
    ) -> None:
        self.loaded = loaded
        self.settings = settings
        ids, mask = _left_padded(prompts)
        self.ids = ids.to(loaded.device)
        self.mask = mask.to(loaded.device)
        self.rows = torch.arange(len(prompts), device=loaded.device)
        self.ended = torch.zeros(len(prompts), dtype=torch.bool, device=loaded.device)
        self.eos = torch.tensor(loaded.eos_ids, device=loaded.device)
        self.answers = torch.full(
            (len(prompts), max_new_tokens), loaded.eos_ids[0], device=loaded.device
        )

    def run(self) -> list[list[int]]:
        """Generate until every row has ended or the budget is spent; return each row's tokens."""
        look = STEPS_PER_LOOK.get(self.loaded.device.type, 1)
        cache = None
        inputs = self.ids
        positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)
        for step in range(self.answers.shape[1]):
            output = self.loaded.model(
                input_ids=inputs,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            inputs = self._record(output.logits[:, -1], step)
            positions = positions[:, -1:] + 1
            if (step + 1) % look == 0 and bool(self.ended.any()):
                keep = (~self.ended).nonzero()[:, 0]
                if len(keep) == 0:
                    break
                cache.batch_select_indices(keep)
                inputs, positions = inputs[keep], positions[keep]
                self._keep(keep)
        return [until_end(row, self.loaded.eos_ids) for row in self.answers.tolist()]

    def _record(self, logits: Tensor, step: int) -> Int[Tensor, "batch 1"]:
        """Choose and keep each row's next token; return the tokens as the next step's input."""
        if self.settings.repetition_penalty != 1.0:
            logits = _penalised(logits, self.ids, self.settings.repetition_penalty)
        chosen = logits.argmax(-1)
        self.answers[self.rows, step] = chosen
        self.ended |= torch.isin(chosen, self.eos)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(chosen), 1)], dim=1)
        if self.settings.repetition_penalty != 1.0:
            self.ids = torch.cat([self.ids, chosen[:, None]], dim=1)
        return chosen[:, None]

    def _keep(self, keep: Int[Tensor, " rows_left"]) -> None:
        """Take the rows that have ended out of the batch."""
        self.mask, self.ids = self.mask[keep], self.ids[keep]
        self.rows, self.ended = self.rows[keep], self.ended[keep]


def _left_padded(
    prompts: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Return ids and the mask of real tokens, the last prompt token in the last column.

    The padding, never attended to, repeats a prompt's own first token: a repetition penalty looks
    at ids without a mask, and a padding token is the end-of-sequence token of many models.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[*[prompt[0]] * (width - len(prompt)), *prompt] for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(width).flip(0) < lengths[:, None]


def _penalised(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty of CTRL (arXiv 1909.05858, section 4.1)."""
    from transformers import RepetitionPenaltyLogitsProcessor

    penalised: Tensor = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    return penalised
