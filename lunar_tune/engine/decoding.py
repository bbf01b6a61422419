"""Greedy answers to prompts, computed from the first token on and for any causal model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lunar_tune.config.options import LEAST_BUDGET
from lunar_tune.display import build_progress, screen
from lunar_tune.models.device import BatchSize, DeviceMemory
from lunar_tune.models.layout import check_answers_fit

if TYPE_CHECKING:
    from rich.console import Console

    from lunar_tune.models.loading import LoadedModel

# Most rows in a batch. On a CPU larger batches win nothing once the weights are read; on a GPU 256
# short rows of a 7B model's cache stay below 10 GiB.
ROWS_PER_BATCH = {"cpu": 192, "cuda": 256}
_ROWS_SHOWN = 64  # answers after which progress is shown, at most
# Steps between looks at which rows have ended: a look is a synchronisation on a GPU.
STEPS_PER_LOOK = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRules:
    """What holds for all answers of one evaluation."""

    edited_layer: int | None
    """See `Fit`; None computes everything anew."""
    max_new_tokens: int
    """Token budget of an answer."""
    stop: Callable[[Sequence[int], Sequence[Sequence[int]]], list[bool]] | None = None
    """Says of each row, from row numbers and tokens so far, whether it need not go on; None lets
    all of them go on."""


def token_budget(max_new_tokens: int | None, truths: Iterable[Sequence[int]]) -> int:
    """Return the token budget: what was asked for, or what the true answers call for."""
    if max_new_tokens is not None:
        return max_new_tokens
    return max(LEAST_BUDGET, 2 * max(map(len, truths), default=0))


def until_end(row: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """Return a row's tokens before its first end-of-sequence token."""
    end = next((place for place, token in enumerate(row) if token in eos_ids), len(row))
    return list(row[:end])


def likeliest(logits: Float[Tensor, "*places vocabulary"]) -> Int[Tensor, "*places"]:
    """Return the first of the likeliest tokens; on a CPU `max` takes a third of `argmax`'s time."""
    return logits.max(-1).indices


class PlainAnswerer:
    """Answers rows of prompts plainly, behind the interface of `answering.Answerer`.

    `generate` answers prompts, within `max_new_tokens`, like `generate_tokens` of some model.
    """

    def __init__(
        self, generate: Callable[..., list[list[int]]], prompts: Sequence[Sequence[int]]
    ) -> None:
        self._generate, self._prompts = generate, prompts

    def prepare(self) -> None:
        """Keep nothing."""

    def begin(self, rules: AnswerRules) -> PlainAnswerer:
        """Begin to answer with the model as it is now, one evaluation at a time."""
        self._max_new_tokens = rules.max_new_tokens
        self._pending: list[int] = []
        self._answers: dict[int, list[int]] = {}
        return self

    def open(self, rows: Sequence[int]) -> Mapping[int, list[int]]:
        """Note what is asked; nothing is known of an answer before it is decoded."""
        self._pending += rows
        return {}

    def close(self) -> Mapping[int, list[int]]:
        """Decode what is open; return the answers to all rows opened so far."""
        prompts = [self._prompts[row] for row in self._pending]
        tokens = self._generate(prompts, max_new_tokens=self._max_new_tokens)
        self._answers |= dict(zip(self._pending, tokens, strict=True))
        self._pending = []
        return dict(self._answers)


def key_bytes(loaded: LoadedModel) -> int:
    """Return the bytes of one token's keys and values of one block."""
    config = loaded.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_key_value_heads * head_dim * loaded.model.dtype.itemsize)


def affordable_rows(
    loaded: LoadedModel, memory: DeviceMemory, *, slots: int, at_once: int = 1
) -> int:
    """Return how many rows fit into memory, by the keys, values, logits and MLP of one.

    A row has `slots` tokens in the end and `at_once` of them in one forward.
    """
    config = loaded.model.config
    row = slots * key_bytes(loaded) * loaded.n_layers + config.vocab_size * 8
    row += at_once * config.intermediate_size * 8 * loaded.model.dtype.itemsize
    return int(memory.free_bytes() // row)


def answer_texts(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    what: str,
    console: Console | None = None,
) -> list[tuple[str, bool]]:
    """Return the greedy answer to each prompt as text, and whether it ended within the budget.

    `what` is asked, to show; no console shows no progress.
    """
    with build_progress(console or screen(quiet=True)) as bar:
        task = bar.add_task(f"asking {what}", total=len(prompts), note="")
        answers = generate_tokens(
            loaded,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=_ROWS_SHOWN,
            on_batch=lambda count: bar.advance(task, count),
        )
    decode = partial(loaded.tokenizer.decode, skip_special_tokens=True)
    return [(str(decode(tokens)), len(tokens) < max_new_tokens) for tokens in answers]


@torch.inference_mode()
def generate_tokens(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    on_batch: Callable[[int], object] = lambda _count: None,
) -> list[list[int]]:
    """Return the greedy answer to each prompt, cut before its first end-of-sequence token.

    Prompts of similar length share a batch, of at most `batch_size` and what memory holds; the
    answers come in the order of `prompts`. `on_batch` hears how many a batch has answered.
    """
    longest = max(map(len, prompts), default=0)
    slots = longest + max_new_tokens
    check_answers_fit(loaded.model.config, slots)
    memory = DeviceMemory(loaded.device)
    affordable = affordable_rows(loaded, memory, slots=slots, at_once=longest)
    most = batch_size or ROWS_PER_BATCH[loaded.device.type]
    batch = BatchSize(min(most, affordable), "the prompts")
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    tokens: dict[int, list[int]] = {}

    def answer(size: int) -> dict[int, list[int]]:
        rows = by_length[len(tokens) : len(tokens) + size]
        answers = _generate_batch(loaded, [prompts[row] for row in rows], max_new_tokens)
        return dict(zip(rows, answers, strict=True))

    while len(tokens) < len(prompts):
        answers = batch.fit(answer)
        tokens |= answers
        on_batch(len(answers))
    return [tokens[row] for row in range(len(prompts))]


def _generate_batch(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Answer prompts in one left-padded batch; rows that have ended are taken out of it.

    The padding, never attended to, repeats a prompt's own first token.
    """
    device, count = loaded.device, len(prompts)
    lengths = torch.tensor(list(map(len, prompts)))
    width = int(lengths.max())
    padded = [[*[prompt[0]] * (width - len(prompt)), *prompt] for prompt in prompts]
    inputs = torch.tensor(padded, device=device)
    mask = (torch.arange(width).flip(0) < lengths[:, None]).to(device)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    rows = torch.arange(count, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    eos = torch.tensor(loaded.eos_ids, device=device)
    answers = torch.full((count, max_new_tokens), loaded.eos_ids[0], device=device)
    look = STEPS_PER_LOOK[device.type]
    cache = None
    for step in range(max_new_tokens):
        output = loaded.model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(-1)
        answers[rows, step] = chosen
        ended |= torch.isin(chosen, eos)
        mask = torch.cat([mask, mask.new_ones(len(chosen), 1)], dim=1)
        inputs, positions = chosen[:, None], positions[:, -1:] + 1
        if (step + 1) % look == 0 and bool(ended.any()):
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                break
            cache.batch_select_indices(going)
            inputs, positions, mask = inputs[going], positions[going], mask[going]
            rows, ended = rows[going], ended[going]
    return [until_end(row, loaded.eos_ids) for row in answers.tolist()]
