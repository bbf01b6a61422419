"""Cases for the engine, and what it is held against: forwards and `generate` of transformers.

PROMPTS   rows that share beginnings, one the beginning of two others, one of a single token
TREE      their distinct prefixes, the nodes
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lunar_tune.engine.activations import ActivationSource, PromptActivations
from lunar_tune.engine.answering import Answerer
from lunar_tune.engine.decoding import AnswerRules
from lunar_tune.engine.forward import PrefixTree
from lunar_tune.methods.lunar.method import edited
from lunar_tune.models.device import BatchSize
from lunar_tune.models.loading import LoadedModel

PROMPTS = (
    (1, 17, 40, 11),
    (1, 17, 40),
    (1, 17, 40, 30, 31, 32),
    (1, 9),
    (1, 60, 61, 62, 63, 64, 65, 66, 67),
    (5,),
    (1, 200, 17, 17, 250, 31),
)
TREE = PrefixTree(PROMPTS)
IDS = torch.tensor([PROMPTS[2], PROMPTS[6]])
NEVER = (320,)
"""Beyond the vocabulary: nothing ever ends."""


def new_weights(loaded: LoadedModel, *layers: int) -> dict[int, Tensor]:
    """Return a down-projection for each layer that is far from the model's own."""
    weights = {}
    for layer in layers:
        weight = loaded.layout.down_projection_of(loaded.model, layer).weight
        generator = torch.Generator().manual_seed(layer)
        weights[layer] = weight + 0.3 * torch.randn(weight.shape, generator=generator)
    return weights


def edited_by_hand(loaded: LoadedModel, weights: Mapping[int, Tensor]) -> Any:
    """Return a copy of the model with other down-projections."""
    model: Any = copy.deepcopy(loaded.model)
    for layer, weight in weights.items():
        model.model.layers[layer].mlp.down_proj.weight.copy_(weight)
    return model


@torch.no_grad()
def full_forwards(model: Any) -> dict[str, Tensor]:
    """Return what is computed at each node, every row alone and unpadded: `[blocks, nodes, ...]`.

    Streams are those at the input of every block and the output of the last one, before the norm.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)
    places = [("streams", model.model.norm)]
    for block in model.model.layers:
        places += [("residual", block.post_attention_layernorm), ("inputs", block.mlp.down_proj)]
        places.append(("streams", block))
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
        for name, module in places
    ]
    rows = []
    for prompt in PROMPTS:
        seen.clear()
        model(input_ids=torch.tensor([prompt]))
        rows.append({name: torch.stack(found) for name, found in seen.items()})
    for handle in handles:
        handle.remove()
    return {name: torch.cat([row[name] for row in rows], 1)[:, TREE.first] for name in rows[0]}


def generated(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    budget: int,
    eos: Sequence[int] = NEVER,
    alone: bool = False,
) -> list[list[int]]:
    """Return what `generate` says greedily, in one left-padded batch or each prompt `alone`."""
    answers = []
    for batch in [[prompt] for prompt in prompts] if alone else [prompts]:
        width = max(map(len, batch))
        ids = model.generate(
            input_ids=torch.tensor([[0] * (width - len(p)) + list(p) for p in batch]),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch]),
            do_sample=False,
            max_new_tokens=budget,
            pad_token_id=0,
            eos_token_id=list(eos),
        )
        answers += cut_all(ids[:, width:].tolist(), eos, budget)
    return answers


def cut_all(answers: Sequence[Sequence[int]], eos: Sequence[int], budget: int) -> list[list[int]]:
    """Return answers to their budget or to before their first end-of-sequence token."""
    within = [list(answer[:budget]) for answer in answers]
    ends = [next((i for i, t in enumerate(row) if t in eos), len(row)) for row in within]
    return [row[:end] for row, end in zip(within, ends, strict=True)]


def ends_of(answers: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return ids that end these answers at different lengths, the first of them at once."""
    return tuple(sorted({2, answers[0][0], answers[2][3], answers[3][6], answers[4][10]}))


def with_eos(loaded: LoadedModel, eos: Sequence[int]) -> LoadedModel:
    """Return the model with other ends."""
    return dataclasses.replace(loaded, eos_ids=tuple(eos))


def answerer(
    loaded: LoadedModel,
    *,
    drafts: Sequence[Sequence[int]] | None = None,
    batch_size: int | None = None,
) -> Answerer:
    """Return an answerer to `PROMPTS`, ready for edits of any block."""
    known = None if drafts is None else dict(zip(PROMPTS, map(tuple, drafts), strict=True))
    activations = PromptActivations(ActivationSource(loaded), PROMPTS, drafts=known)
    made = Answerer(activations, deepest=2)
    if batch_size is not None:
        made.decode_size = BatchSize(batch_size, "the answers")
    made.prepare()
    return made


def answers_of(
    made: Answerer,
    weights: Mapping[int, Tensor],
    *,
    budget: int,
    edited_layer: int | None = -1,
    groups: Sequence[Sequence[int]] = (tuple(range(len(PROMPTS))),),
) -> list[list[int]]:
    """Return the edited model's answers, opened group after group, in the order of the rows."""
    if edited_layer == -1:
        edited_layer = min(weights, default=None)
    if edited_layer is not None:
        made.activations.reads(edited_layer)  # of the base model, as a fit asks for them
    known: dict[int, list[int]] = {}
    with edited(made.loaded, weights):
        run = made.begin(AnswerRules(edited_layer=edited_layer, max_new_tokens=budget))
        for group in groups:
            known |= run.open(group)
        answers = run.close()
    assert sorted(answers) == sorted(row for group in groups for row in group)
    assert all(answers[row] == tokens for row, tokens in known.items())
    return [list(answers[row]) for row in sorted(answers)]
