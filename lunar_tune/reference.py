"""LUNAR on one page (arXiv 2502.07218): read `unlearn` first, then its steps in order of use.

Needs torch and transformers alone and keeps nothing between calls; the engine of this package must
give the same answers. "Published" means facebookresearch/LUNAR at dfa56eb. A prompt is a list of
token ids, chat template included; `reference`, `forget` and `retain` are lists of prompts:

    unlearned = unlearn(model, layers=[22], coefficient=2.0, reference=reference, forget=forget,
                        retain=retain, solver=partial(fit_adamw, learning_rate=0.01))
    answers = greedy_answers(unlearned, forget, eos_ids=[tokenizer.eos_token_id])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GenerationConfig, PreTrainedModel

BATCH_SIZE = 16  # prompts of a forward pass or of `generate`; the published evaluation's size

Prompts: TypeAlias = Sequence[Sequence[int]]
Solver: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps h `[tokens, d_ff]`, is_forget `[tokens]` and shift `[d_model]` to Δ `[d_model, d_ff]`."""


def unlearn(
    model: PreTrainedModel,
    *,
    layers: Sequence[int],
    coefficient: float,
    reference: Prompts,
    forget: Prompts,
    retain: Prompts,
    solver: Solver,
) -> PreTrainedModel:
    """Return an unlearned copy of the base model: it declines `forget` as it declines `reference`.

    In each layer one matrix changes, the MLP's down-projection W₀ `[d_model, d_ff]`. It reads h
    and adds W₀h to the residual stream. The new matrix W = W₀ + Δ is to add (equation 4)

        W₀h + c·r  at every token of a forget prompt (c·r is the shift),
        W₀h        at every token of a retain prompt,

    hence Δh ≈ c·r and Δh ≈ 0. Layers are fitted one by one on the base model's activations
    (published: by the sum of their losses, which share no parameter).

    Args:
        model: The base model in evaluation mode; not modified.
        layers: Decoder blocks, counted from 0.
        coefficient: c, how many unlearning vectors the forget tokens move (published: 2).
        reference: Prompts that the base model declines to answer.
        forget: Questions to unlearn.
        retain: Questions whose answers are to stay.
        solver: `fit_adamw` or `fit_closed_form`; `functools.partial` sets its options.

    Raises:
        ValueError: A list of prompts is empty, a layer does not exist, LUNAR does not suit its
            family, or a fitted matrix is not finite.
    """
    if not (reference and forget and retain):
        raise ValueError("reference, forget and retain need at least one prompt each.")
    unlearned = copy.deepcopy(model)
    for layer in layers:
        shift = coefficient * unlearning_vector(model, layer, reference, forget)
        forget_h, retain_h = (mlp_inputs(model, layer, prompts) for prompts in (forget, retain))
        h = torch.cat([forget_h, retain_h])
        is_forget = torch.arange(len(h), device=h.device) < len(forget_h)
        add_difference(unlearned, layer, solver(h, is_forget, shift))
    return unlearned


@torch.no_grad()
def unlearning_vector(
    model: PreTrainedModel, layer: int, reference_prompts: Prompts, forget_prompts: Prompts
) -> Tensor:
    """Return r = mean_reference(x) − mean_forget(x), `[d_model]` in float64 (equation 3).

    x is the output of block `layer` at a prompt's last token. The published code records the input
    of the next block, which is the same but leaves the last block without a vector. It passes no
    position ids, so that padding on the left shifts the positions of shorter prompts.
    """
    block, means = _block(model, layer), []
    for prompts in (reference_prompts, forget_prompts):
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for batch in _batches(prompts, model.device):
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            total = total + _record(model, block, batch)[:, -1].double().sum(0)
        means.append(total / len(prompts))
    return means[0] - means[1]


@torch.no_grad()
def mlp_inputs(model: PreTrainedModel, layer: int, prompts: Prompts) -> Tensor:
    """Return h, the input of block `layer`'s down-projection, `[tokens, d_ff]`.

    A row is a token, prompt after prompt, in the model's number format. As published, the model
    runs over the prompts three times, one prompt at a time: for the block's output x, for h, and
    for the residual y before the MLP. The published target x + c·r − y is W₀h + c·r up to rounding.
    Δ needs h alone; x and y are recorded only so that the time compares with the published code.
    """
    block = _block(model, layer)
    alone = [{"input_ids": torch.tensor([list(ids)], device=model.device)} for ids in prompts]
    _x, h, _y = (
        torch.cat([_record(model, module, ids, of_output=module is block)[0] for ids in alone])
        for module in (block, block.mlp.down_proj, block.post_attention_layernorm)
    )
    return h


def fit_adamw(
    inputs: Tensor,
    is_forget: Tensor,
    shift: Tensor,
    *,
    learning_rate: float,
    epochs: int = 20,
    seed: int = 0,
) -> Tensor:
    """Minimise the mean of (Δh − 1_forget·shift)² by AdamW from Δ = 0; return Δ in float32.

    Shapes are those of `Solver`. A step takes 64 tokens, in an order that follows from `seed`;
    `learning_rate` (published: 0.01) falls to 0.9 of itself after each epoch. The published code
    trains W itself in bfloat16, where small updates are lost, from an unseeded order, with weight
    decay 0.01. Δ is trained in float32 without it, and retain tokens start exactly on target.
    """
    inputs = inputs.float()
    targets = is_forget[:, None] * shift.to(inputs)
    difference = nn.Parameter(torch.zeros(len(shift), inputs.shape[1], device=inputs.device))
    data = TensorDataset(inputs, targets)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([difference], lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator).tolist()
        for h, target in DataLoader(data, batch_size=64, sampler=order):
            optimizer.zero_grad()
            nn.functional.mse_loss(nn.functional.linear(h, difference), target).backward()
            optimizer.step()
        schedule.step()
    return difference.detach()


def fit_closed_form(inputs: Tensor, is_forget: Tensor, shift: Tensor, *, ridge: float) -> Tensor:
    """Minimise Σ‖Δh − 1_forget·shift‖² + λ‖Δ‖²; return Δ = shift·vᵀ, rank one, in float64.

    Shapes are those of `Solver`, `ridge` has no unit; the published code has no such solver. With
    the tokens' h as the rows of H, the smaller of two systems with one solution is solved:

        v = (HᵀH + λI)⁻¹ Hᵀ 1_forget = Hᵀ (HHᵀ + λI)⁻¹ 1_forget,  λ = ridge · tr(HᵀH) / d_ff
    """
    if not ridge > 0:  # repeated tokens would make the system singular
        raise ValueError(f"ridge {ridge}: choose a positive number.")
    h, indicator = inputs.double(), is_forget.double()
    strength = ridge * (h * h).sum() / h.shape[1]
    identity = torch.eye(min(h.shape), dtype=h.dtype, device=h.device)
    if len(h) >= h.shape[1]:
        v = torch.linalg.solve(h.T @ h + strength * identity, h.T @ indicator)
    else:
        v = h.T @ torch.linalg.solve(h @ h.T + strength * identity, indicator)
    return torch.outer(shift, v)


@torch.no_grad()
def add_difference(model: PreTrainedModel, layer: int, difference: Tensor) -> None:
    """Set block `layer`'s down-projection to W₀ + Δ in its number format; modify `model`."""
    weight = _block(model, layer).mlp.down_proj.weight
    weight.copy_((weight.to(difference.dtype) + difference).to(weight.dtype))
    if not weight.isfinite().all():  # the fit diverged, or the number format is too narrow
        raise ValueError(f"layer {layer}: not finite; lower the learning rate or coefficient.")


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, prompts: Prompts, *, eos_ids: Sequence[int], max_new_tokens: int = 512
) -> list[list[int]]:
    """Return each prompt's answer: most likely tokens, up to the first one of `eos_ids`.

    With empty `eos_ids` each has `max_new_tokens`. The published code decodes its prompts and
    encodes them again, with a second BOS in some families, and keeps what a model's own generation
    configuration says, such as a repetition penalty; here that is put aside.
    """
    answers: list[list[int]] = []
    generate: Any = model.generate
    ends: dict[str, Any] = {"eos_token_id": list(eos_ids) or None, "pad_token_id": [*eos_ids, 0][0]}
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **ends)
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        for batch in _batches(prompts, model.device):
            new = generate(**batch, generation_config=greedy)[:, batch["input_ids"].shape[1] :]
            answers += [list(takewhile(lambda i: i not in eos_ids, row)) for row in new.tolist()]
    finally:
        model.generation_config = own
    return answers


def _block(model: PreTrainedModel, layer: int) -> Any:
    """Return decoder block `layer`; refuse one that does not add W₀h unchanged to the residual."""
    blocks: Any = model.get_submodule("model.layers")
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer {layer}: the model has blocks 0 to {len(blocks) - 1}.")
    block = blocks[layer]
    after_mlp = ("post_feedforward_layernorm", "residual_multiplier")  # as in Gemma 2; in Granite
    down_projection = getattr(getattr(block, "mlp", None), "down_proj", None)
    if down_projection is None or any(hasattr(block, name) for name in after_mlp):
        raise ValueError(
            f"{model.config.model_type}: a norm or factor follows the MLP, or it has no down_proj, "
            "so c·r cannot be added there. Use Llama, Mistral, Qwen 2 or 3, Gemma 1 or Phi-3."
        )
    return block


def _record(
    model: PreTrainedModel, module: nn.Module, inputs: dict[str, Tensor], *, of_output: bool = True
) -> Tensor:
    """Run the model and return the module's output, or what it read, `[batch, seq, features]`."""
    calls: list[Any] = []
    with module.register_forward_hook(lambda *call: calls.append(call)):
        model(**inputs)
    _module, args, output = calls[0]
    recorded = output if of_output else args
    tensor: Tensor = recorded[0] if isinstance(recorded, tuple) else recorded
    return tensor


def _batches(prompts: Prompts, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield token ids and attention mask, int64 `[batch, seq]` each, padded on the left."""
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        width = max(map(len, batch))
        ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in batch]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]
        inputs = {"input_ids": ids, "attention_mask": mask}
        yield {name: torch.tensor(rows, device=device) for name, rows in inputs.items()}
