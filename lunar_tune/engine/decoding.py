"""Greedy answers to prompts, computed from the first token on and for any causal model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lunar_tune.config.run_options import LEAST_BUDGET
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
    max_new_tokens: int | None, tokenizer: PreTrainedTokenizerBase, truths: Iterable[str]
) -> int:
    """Return the token budget: what was asked for, or what the true answers call for."""
    if max_new_tokens is not None:
        return max_new_tokens
    ids = tokenizer(list(truths) or [""], add_special_tokens=False)["input_ids"]
    return max(LEAST_BUDGET, 2 * max(len(row) for row in ids))


@runtime_checkable
class Generate(Protocol):
    """Answers prompts greedily, with new tokens up to a budget."""

    def __call__(
        self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
    ) -> list[list[int]]:
        """Return the answer to each prompt, cut before its first end-of-sequence token."""


class PlainAnswerer:
    """Answers rows of prompts plainly, behind the interface of `answering.Answerer`.

    Args:
        loaded: The model, edited or not.
        prompts: Token ids by row.
        generate: Answers prompts; None is `generate_tokens`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        generate: Generate | None = None,
    ) -> None:
        self._loaded, self._prompts = loaded, prompts
        self._generate = generate or generate_tokens

    def prepare(self) -> None:
        """Keep nothing."""

    def begin(self, rules: AnswerRules) -> PlainRun:
        """Begin to answer with the model as it is now."""
        return PlainRun(self._loaded, self._prompts, rules.max_new_tokens, self._generate)


class PlainRun:
    """Answers of the model as it is now; nothing is known of an answer before it is decoded."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        generate: Generate,
    ) -> None:
        self._loaded, self._prompts, self._max_new_tokens = loaded, prompts, max_new_tokens
        self._generate = generate
        self._pending: list[int] = []
        self._answers: dict[int, list[int]] = {}

    def open(self, rows: Sequence[int]) -> Mapping[int, list[int]]:
        """Note what is asked."""
        self._pending += rows
        return {}

    def close(self) -> Mapping[int, list[int]]:
        """Decode what is open; return the answers to all rows opened so far."""
        prompts = [self._prompts[row] for row in self._pending]
        tokens = self._generate(self._loaded, prompts, max_new_tokens=self._max_new_tokens)
        self._answers |= dict(zip(self._pending, tokens, strict=True))
        self._pending = []
        return dict(self._answers)


@torch.inference_mode()
def generate_tokens(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
) -> list[list[int]]:
    """Return the greedy answer to each prompt, cut before its first end-of-sequence token.

    Prompts of similar length share a batch; the answers come in the order of `prompts`.

    Args:
        loaded: The model, edited or not.
        prompts: Token ids of each prompt.
        max_new_tokens: Token budget of an answer.
        batch_size: Rows in a batch; None takes what suits the device.
    """
    size = batch_size or ROWS_PER_BATCH.get(loaded.device.type, ROWS_PER_BATCH["cpu"])
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    tokens: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), size):
        rows = by_length[start : start + size]
        batch = _Batch(loaded, [prompts[row] for row in rows], max_new_tokens)
        for row, answer in zip(rows, batch.run(), strict=True):
            tokens[row] = answer
    return tokens


class _Batch:
    """One batch of prompts being answered; rows that have ended are taken out."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
    ) -> None:
        self.loaded = loaded
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
        chosen = logits.argmax(-1)
        self.answers[self.rows, step] = chosen
        self.ended |= torch.isin(chosen, self.eos)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(chosen), 1)], dim=1)
        return chosen[:, None]

    def _keep(self, keep: Int[Tensor, " rows_left"]) -> None:
        """Take the rows that have ended out of the batch."""
        self.mask = self.mask[keep]
        self.rows, self.ended = self.rows[keep], self.ended[keep]


def _left_padded(
    prompts: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Return ids and the mask of real tokens, the last prompt token in the last column.

    The padding, never attended to, repeats a prompt's own first token.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[*[prompt[0]] * (width - len(prompt)), *prompt] for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(width).flip(0) < lengths[:, None]
