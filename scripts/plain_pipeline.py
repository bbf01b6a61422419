"""One trial as the published pipeline runs it: nothing kept, nothing shared.

Covers: a fresh load, directions, six sweeps at batch size 1 for one layer, a deep copy of the
model, a data loader over single tokens, an autograd AdamW (or a ridge solution in float64),
generation by transformers set by set in batches of 16, ROUGE; stage by stage with seconds. Written
on transformers and torch alone, so that it is also an independent computation to hold the engine
against.
Does not cover: rank metrics; anything that the engine does.

The order of things follows facebookresearch/LUNAR at dfa56eb; the fitted difference from the
original matrix in float32, batch order and optimiser are the engine's, so that scores can be equal.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rouge_score import rouge_scorer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

__all__ = ["PlainModel", "PlainResult", "Questions", "plain_trial"]

GENERATION_BATCH = 16  # the published code's evaluation batch
TOKENS_PER_STEP = 64  # the published code's batch of tokens
LEARNING_RATE_DECAY = 0.9
DIRECTION_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class PlainModel:
    """Where the model is read from, and how."""

    folder: str
    tokenizer: Any
    eos_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    build: Callable[[], Any] | None = None
    """Makes a model instead of loading one; for models of random weights."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Encoded prompts, and true answers of those that are evaluated."""

    forget: Sequence[Sequence[int]]
    retain: Sequence[Sequence[int]]
    reference: Sequence[Sequence[int]]
    evaluated: Sequence[Sequence[Sequence[int]]]
    """Prompts of each set: forget, retain, factual."""
    truths: Sequence[str]
    """Of all sets, one after the other."""


@dataclass(kw_only=True)
class PlainResult:
    """Answers, their recalls, and where the time went."""

    tokens: list[list[int]] = field(default_factory=list)
    """New tokens of each evaluated prompt, cut before the first end-of-sequence token."""
    rouge1: list[float] = field(default_factory=list)
    rouge_l: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the seconds spent inside to a stage."""
        start = _clock(device)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + _clock(device) - start


def plain_trial(
    model: PlainModel,
    questions: Questions,
    parameters: Mapping[str, Any],
    *,
    solver: str,
    epochs: int = 20,
    seed: int = 0,
    max_new_tokens: int = 512,
    end_at_eos: bool = True,
) -> PlainResult:
    """Run one trial with nothing kept from another.

    Args:
        model: What to load.
        questions: What is forgotten, kept and asked.
        parameters: `layer`, `coefficient`, and `learning_rate` or `ridge`.
        solver: adamw or closed_form.
        epochs: Passes of adamw.
        seed: Of the batch order.
        max_new_tokens: Token budget of an answer.
        end_at_eos: Whether an answer may end before its budget.
    """
    result = PlainResult()
    layer, device = int(parameters["layer"]), model.device
    with result.stage("load", device):
        loaded = _load(model)
    blocks = loaded.model.layers
    with result.stage("directions", device):
        shift = parameters["coefficient"] * (
            _mean_last(loaded, blocks[layer], questions.reference)
            - _mean_last(loaded, blocks[layer], questions.forget)
        )
    with result.stage("activations", device):
        forget, retain = (
            _six_sweeps(loaded, layer, prompts) for prompts in (questions.forget, questions.retain)
        )
    with result.stage("copy", device):
        edited = copy.deepcopy(loaded)
    projection = edited.model.layers[layer].mlp.down_proj
    inputs = torch.cat([forget, retain])
    moved = torch.zeros(len(inputs), dtype=torch.bool, device=device)
    moved[: len(forget)] = True
    with result.stage("fit", device):
        if solver == "adamw":
            difference = _adamw(
                inputs, moved, shift, parameters["learning_rate"], epochs=epochs, seed=seed
            )
        else:
            difference = _ridge(inputs, moved, shift, parameters["ridge"])
        with torch.no_grad():
            weight = projection.weight
            weight.copy_((weight.to(difference.dtype) + difference).to(weight.dtype))
    with result.stage("generate", device):
        for prompts in questions.evaluated:
            result.tokens += _generate(edited, model, prompts, max_new_tokens, end_at_eos)
    with result.stage("score", device):
        answers = model.tokenizer.batch_decode(result.tokens, skip_special_tokens=True)
        result.rouge1, result.rouge_l = recalls(questions.truths, answers)
    result.seconds["total"] = sum(result.seconds.values())
    return result


def recalls(truths: Sequence[str], answers: Sequence[str]) -> tuple[list[float], list[float]]:
    """Return ROUGE-1 and ROUGE-L recall of each answer."""
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(truth, answer) for truth, answer in zip(truths, answers, strict=True)]
    return (
        [float(score["rouge1"].recall) for score in scores],
        [float(score["rougeL"].recall) for score in scores],
    )


def _load(model: PlainModel) -> Any:
    if model.build is not None:
        return model.build()
    loaded: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=model.dtype)
    return loaded.to(model.device).eval()


@torch.no_grad()
def _mean_last(loaded: Any, block: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean output of a block at the last prompt token, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=loaded.device)
    for start in range(0, len(prompts), DIRECTION_BATCH):
        batch = prompts[start : start + DIRECTION_BATCH]
        ids, mask = _left_padded(batch, loaded.device)
        with _watching(block, of_output=True) as seen:
            loaded(input_ids=ids, attention_mask=mask, position_ids=_positions(mask))
        total = total + seen[0][:, -1].double().sum(0)
    return total / len(prompts)


@torch.no_grad()
def _six_sweeps(loaded: Any, layer: int, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the down-projection's inputs; as published, three sweeps for each of two sets.

    The published code records the block's output, the down-projection's input and the residual
    before the MLP in a sweep each, one prompt at a time.
    """
    block = loaded.model.layers[layer]
    recorded = {}
    for module, of_output in (
        (block, True),
        (block.mlp.down_proj, False),
        (block.post_attention_layernorm, False),
    ):
        rows = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=loaded.device)
            with _watching(module, of_output=of_output) as seen:
                loaded(input_ids=ids)
            rows.append(seen[0][0])
        recorded[module] = torch.cat(rows)
    return recorded[block.mlp.down_proj]


def _adamw(
    inputs: Tensor, moved: Tensor, shift: Tensor, learning_rate: float, *, epochs: int, seed: int
) -> Tensor:
    """Fit the difference from the original matrix with a data loader over single tokens."""
    inputs = inputs.float()
    targets = moved[:, None] * shift.to(inputs)
    difference = nn.Parameter(torch.zeros(len(shift), inputs.shape[1], device=inputs.device))
    data = TensorDataset(inputs, targets)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([difference], lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=LEARNING_RATE_DECAY)
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator).tolist()
        for h, target in DataLoader(data, batch_size=TOKENS_PER_STEP, sampler=order):
            optimizer.zero_grad()
            nn.functional.mse_loss(nn.functional.linear(h, difference), target).backward()
            optimizer.step()
        schedule.step()
    return difference.detach()


def _ridge(inputs: Tensor, moved: Tensor, shift: Tensor, ridge: float) -> Tensor:
    """Solve the ridge problem by its normal equations, in float64, from the beginning."""
    h = inputs.double()
    strength = ridge * (h * h).sum() / h.shape[1]
    indicator = moved.double()
    if len(h) >= h.shape[1]:
        system = h.T @ h + strength * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
        v = torch.linalg.solve(system, h.T @ indicator)
    else:
        system = h @ h.T + strength * torch.eye(len(h), dtype=h.dtype, device=h.device)
        v = h.T @ torch.linalg.solve(system, indicator)
    return torch.outer(shift, v)


@torch.no_grad()
def _generate(
    edited: Any,
    model: PlainModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_at_eos: bool,
) -> list[list[int]]:
    """Return greedy answers, prompts in their order, in batches of 16."""
    answers: list[list[int]] = []
    ends = {"eos_token_id": list(model.eos_ids)} if end_at_eos else {"eos_token_id": None}
    for start in range(0, len(prompts), GENERATION_BATCH):
        ids, mask = _left_padded(prompts[start : start + GENERATION_BATCH], edited.device)
        output = edited.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=model.eos_ids[0],
            **ends,
        )
        answers += [_until(row, model.eos_ids) for row in output[:, ids.shape[1] :].tolist()]
    return answers


def _until(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in eos_ids), len(row))]


@contextmanager
def _watching(module: nn.Module, *, of_output: bool) -> Iterator[list[Tensor]]:
    """Inside, what a module reads or gives is appended to the list."""
    seen: list[Tensor] = []

    def on_output(_module: Any, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    def on_input(_module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    handle = (
        module.register_forward_hook(on_output)
        if of_output
        else module.register_forward_pre_hook(on_input)
    )
    try:
        yield seen
    finally:
        handle.remove()


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
