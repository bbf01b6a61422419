"""Greedy answers from what is known of the base model: each prompt is computed once.

Everything here gives the tokens of plain greedy decoding, up to rounding: a batch of another shape
adds in another order. In float32 that hardly ever decides between two tokens; in bfloat16 it may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from lunar_tune.engine.answer_rules import AnswerRules
from lunar_tune.engine.forward import NodeKeys, TreeBatch, arrange, tree_forward
from lunar_tune.engine.guessing import Guesser
from lunar_tune.engine.prompt_activations import PromptActivations
from lunar_tune.engine.slot_decoding import SlotDecoding, likeliest, until_end
from lunar_tune.engine.slots import SlotCache
from lunar_tune.engine.streams import sweep_batch
from lunar_tune.models.device import BatchSize

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = ["Answerer", "choose_tokens"]

# Slots for new tokens before a cache grows for the first time; most answers are shorter.
FIRST_SLOTS = 64
# Of the free device memory, the share that the base model's keys and values may take.
KEYS_SHARE = 0.2
# Logits that are held at once, in elements.
LOGITS_AT_ONCE = 2**27


@dataclass(frozen=True, slots=True)
class _Opening:
    """The first round of some rows, arranged."""

    batches: tuple[TreeBatch, ...]
    asked: Int[Tensor, "rows draft_and_one"]
    """Nodes after which a row's new tokens are chosen: its prompt's end, then its draft's."""
    draft: Int[Tensor, "rows draft"]
    """Tokens of the draft; minus one where it is shorter."""


class Answerer:
    """Answers to the rows of a worker, trial after trial.

    Args:
        activations: Of the base model on these rows.
        deepest: The last block that may be edited: so many blocks' keys and values are kept; -1
            where the whole model may be another one.
        batch_size: Rows decoded together; None takes as many as fit.
    """

    def __init__(
        self, activations: PromptActivations, *, deepest: int, batch_size: int | None = None
    ) -> None:
        self.activations = activations
        self.loaded: LoadedModel = activations.source.loaded
        self.trial_keys = NodeKeys(activations.tree.n_nodes, self.loaded.device)
        """Keys of the blocks above the edit; each trial writes its own."""
        self.guesser = Guesser(activations.drafts)
        self._deepest = deepest
        self._asked_size = batch_size
        self._openings: dict[object, _Opening] = {}
        self._decode_sizes: dict[int, BatchSize] = {}

    def prepare(self) -> None:
        """Compute what is kept of the model; it must be unmodified, unlike later."""
        _ = self.kept_keys

    def begin(self, rules: AnswerRules) -> AnsweringRun:
        """Begin to answer with the model as it is now."""
        return AnsweringRun(self, rules)

    @cached_property
    def kept_keys(self) -> NodeKeys | None:
        """Keys and values of the blocks that may lie below an edit, where they fit."""
        if self._deepest < 0:
            return None
        memory, tree = self.activations.source.memory, self.activations.tree
        size = 2 * tree.n_nodes * _key_width(self.loaded) * (self._deepest + 1)
        if size * self.loaded.model.dtype.itemsize > memory.free_bytes() * KEYS_SHARE:
            return None

        def compute(budget: int) -> NodeKeys:
            keys = NodeKeys(tree.n_nodes, self.loaded.device)
            rows, lengths = range(tree.n_rows), tree.lengths.tolist()
            for batch in arrange(
                tree, rows, lengths, set(), set(), budget=budget, device=self.loaded.device
            ):
                tree_forward(self.loaded, batch, 0, None, keys, stop=self._deepest + 1)
            return keys

        return self.forward_size.fit(compute)

    @cached_property
    def forward_size(self) -> BatchSize:
        """Prefixes in one forward of the first round."""
        return sweep_batch(self.loaded, self.activations.source.memory, 4)

    def opening(
        self, rows: tuple[int, ...], before: tuple[tuple[int, ...], ...], budget: int
    ) -> _Opening:
        """Arrange the first round of some rows, once for all trials.

        Args:
            rows: The rows.
            before: What was opened before in the same evaluation.
            budget: Prefixes in one forward.
        """
        key = (rows, before, budget)
        if key not in self._openings:
            self._openings[key] = self._arranged(rows, before, budget)
        return self._openings[key]

    def _arranged(
        self, rows: tuple[int, ...], before: tuple[tuple[int, ...], ...], budget: int
    ) -> _Opening:
        tree, device = self.activations.tree, self.loaded.device
        prompt_lengths, drafts = self.activations.prompt_lengths, self.activations.drafts
        done = {node for earlier in before for node in tree.nodes_of(earlier).tolist()}
        longest = max((len(drafts[row]) for row in rows), default=0)
        places = [
            [
                int(tree.offsets[row]) + prompt_lengths[row] - 1 + min(i, len(drafts[row]))
                for i in range(longest + 1)
            ]
            for row in rows
        ]
        asked = tree.nodes[torch.tensor(places, dtype=torch.int64).reshape(len(rows), longest + 1)]
        table = [[*drafts[row], *[-1] * (longest - len(drafts[row]))] for row in rows]
        batches = arrange(
            tree,
            rows,
            tree.lengths[list(rows)].tolist(),
            done,
            self._asked_nodes,
            budget=budget,
            device=device,
        )
        return _Opening(
            batches=tuple(batches),
            asked=asked.to(device),
            draft=torch.tensor(table, dtype=torch.int64, device=device).reshape(len(rows), longest),
        )

    @cached_property
    def _asked_nodes(self) -> set[int]:
        """The nodes after which any row's answer is chosen: the prompts' ends and the drafts."""
        tree, lengths = self.activations.tree, self.activations.prompt_lengths
        offsets = tree.offsets.tolist()
        return {
            node
            for row in range(tree.n_rows)
            for node in tree.nodes[offsets[row] + lengths[row] - 1 : offsets[row + 1]].tolist()
        }

    def above(self, layer: int) -> Float[Tensor, "nodes d_model"]:
        """Return the stream above the edited block: only what its MLP adds is computed."""
        reads = self.activations.reads(layer)
        weight = self.loaded.layout.down_projection_of(self.loaded.model, layer).weight
        return reads.residual + linear(reads.inputs, weight)  # rounded twice, as in the block

    def decode_size(self, max_new_tokens: int) -> BatchSize:
        """Return how many rows are decoded together: what was asked for, or what fits.

        The estimate counts a row's keys, values, logits and MLP; it is remembered as it shrinks.
        """
        if max_new_tokens not in self._decode_sizes:
            config, loaded = self.loaded.model.config, self.loaded
            slots = max(self.activations.prompt_lengths) + min(max_new_tokens, FIRST_SLOTS)
            row = 2 * slots * _key_width(loaded) * loaded.n_layers * loaded.model.dtype.itemsize
            row += config.vocab_size * 8 + config.intermediate_size * 32
            fits = self.activations.source.memory.free_bytes() // row
            self._decode_sizes[max_new_tokens] = BatchSize(self._asked_size or fits, "the answers")
        return self._decode_sizes[max_new_tokens]


class AnsweringRun:
    """Answers of the model as it is now.

    Args:
        answerer: What is kept from run to run.
        rules: Of this run.
    """

    def __init__(self, answerer: Answerer, rules: AnswerRules) -> None:
        self._answerer, self._rules = answerer, rules
        self._activations, self._loaded = answerer.activations, answerer.loaded
        self._opened: tuple[tuple[int, ...], ...] = ()
        self._answers: dict[int, list[int]] = {}
        self._pending: dict[int, list[int]] = {}
        n_nodes = self._activations.tree.n_nodes
        self._chosen = torch.zeros(n_nodes, dtype=torch.int64, device=self._loaded.device)
        """The token that the model chooses after each node that is asked."""

    @torch.inference_mode()
    def open(self, rows: Sequence[int]) -> Mapping[int, list[int]]:
        """Compute prompts and check drafts; return the answers that are known by that.

        Args:
            rows: Rows that were not opened yet, each once.
        """
        if not rows:
            return {}
        opening = self._answerer.forward_size.fit(lambda size: self._first_round(tuple(rows), size))
        self._opened = (*self._opened, tuple(rows))
        tokens, goes_on = self._check(opening)
        on = [i for i, going in enumerate(goes_on) if going]
        stop = self._rules.stop
        if stop is not None and on:
            said = stop([rows[i] for i in on], [tokens[i] for i in on])
            on = [i for i, done in zip(on, said, strict=True) if not done]
        self._pending |= {rows[i]: tokens[i] for i in on}
        known = {row: tokens[i] for i, row in enumerate(rows) if row not in self._pending}
        self._answers |= known
        return known

    @torch.inference_mode()
    def close(self) -> Mapping[int, list[int]]:
        """Decode what is open to its end; return the answers to all rows opened so far."""
        if self._pending:
            # Rows of one length leave together; long ones do not make short ones wait.
            order = sorted(self._pending, key=lambda row: self._activations.prompt_lengths[row])
            size = self._answerer.decode_size(self._rules.max_new_tokens)
            answers = size.fit(lambda most: self._decode(order, most))
            for row, answer in answers.items():
                self._answerer.guesser.remember(row, answer)
            self._answers |= answers
            self._pending = {}
        return dict(self._answers)

    @cached_property
    def _start(self) -> int:
        layer = self._rules.edited_layer
        return 0 if layer is None else layer + 1

    @cached_property
    def _stream(self) -> Float[Tensor, "nodes d_model"] | None:
        layer = self._rules.edited_layer
        return None if layer is None else self._answerer.above(layer)

    def _first_round(self, rows: tuple[int, ...], budget: int) -> _Opening:
        opening = self._answerer.opening(rows, self._opened, budget)
        for batch in opening.batches:
            hidden = tree_forward(
                self._loaded, batch, self._start, self._stream, self._answerer.trial_keys
            )
            self._chosen[batch.nodes[batch.asked]] = choose_tokens(self._loaded, hidden)
        return opening

    def _check(self, opening: _Opening) -> tuple[list[list[int]], list[bool]]:
        """Return each row's tokens as far as they are known, and whether it must go on."""
        chosen = self._chosen[opening.asked]
        budget = self._rules.max_new_tokens
        agrees = chosen[:, :-1] == opening.draft
        known = (agrees.long().cumprod(1).sum(1) + 1).clamp(max=budget)
        table = torch.cat([known[:, None], chosen], dim=1).tolist()
        rows = [row[1 : 1 + row[0]] for row in table]
        eos = self._loaded.eos_ids
        goes_on = [len(row) < budget and not any(token in eos for token in row) for row in rows]
        return [until_end(row, eos) for row in rows], goes_on

    def _decode(self, order: Sequence[int], most: int) -> dict[int, list[int]]:
        answers: dict[int, list[int]] = {}
        for first in range(0, len(order), most):
            rows = order[first : first + most]
            tokens = [self._pending[row] for row in rows]
            lengths = self._activations.prompt_lengths
            held = [lengths[row] + len(said) - 1 for row, said in zip(rows, tokens, strict=True)]
            cache = SlotCache(len(rows), max(held) + min(self._rules.max_new_tokens, FIRST_SLOTS))
            self._fill(cache, rows, held)
            decoding = SlotDecoding(
                self._loaded,
                cache,
                rows=rows,
                tokens=tokens,
                held=held,
                rules=self._rules,
                guesser=self._answerer.guesser,
            )
            answers |= decoding.run()
        return answers

    def _fill(self, cache: SlotCache, rows: Sequence[int], held: Sequence[int]) -> None:
        """Give rows the keys and values of their prompts and of what they have said so far."""
        device, kept = self._loaded.device, self._answerer.kept_keys
        if kept is not None and self._start > len(kept.keys):
            kept = None  # the edit lies above what is kept
        nodes = self._activations.tree.nodes_of(rows, held).to(device)
        counts = torch.tensor(held)
        row_index = torch.arange(len(rows)).repeat_interleave(counts).to(device)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        positions = (torch.arange(int(counts.sum())) - starts).to(device)
        if kept is None and self._start:
            self._compute_below(rows, held)
            kept = self._answerer.trial_keys
        for layer in range(self._loaded.n_layers):
            source = self._answerer.trial_keys if layer >= self._start or kept is None else kept
            cache.fill(
                layer, row_index, positions, source.keys[layer][nodes], source.values[layer][nodes]
            )

    def _compute_below(self, rows: Sequence[int], held: Sequence[int]) -> None:
        """Compute the keys and values below the edit's MLP for these rows alone."""
        tree, keys = self._activations.tree, self._answerer.trial_keys
        budget = self._answerer.forward_size.size
        for batch in arrange(
            tree, rows, held, set(), set(), budget=budget, device=self._loaded.device
        ):
            tree_forward(self._loaded, batch, 0, None, keys, stop=self._start)


def choose_tokens(
    loaded: LoadedModel, hidden: Float[Tensor, "places d_model"]
) -> Int[Tensor, " places"]:
    """Return the likeliest next token at each place, a bounded number of logits at a time."""
    head = loaded.model.get_output_embeddings()
    step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    return torch.cat([likeliest(head(part)) for part in hidden.split(step)])


def _key_width(loaded: LoadedModel) -> int:
    """Return the numbers in one token's keys of one block."""
    config = loaded.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_key_value_heads * head_dim)
