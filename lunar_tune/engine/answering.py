"""Greedy answers from what is known of the base model: each prompt is computed once.

Everything here gives the tokens of plain greedy decoding, up to rounding: a batch of another shape
adds in another order. In float32 that hardly ever decides between two tokens; in bfloat16 it may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lunar_tune.engine.activations import PromptActivations, sweep_batch
from lunar_tune.engine.decoding import (
    AnswerRules,
    affordable_rows,
    key_bytes,
    likeliest,
    until_end,
)
from lunar_tune.engine.forward import KeyValues, TreeBatch, arrange, tree_forward
from lunar_tune.engine.slot_decoding import Guesser, SlotCache, SlotDecoding
from lunar_tune.models.device import BatchSize

# Slots for new tokens before a cache grows for the first time; most answers are shorter.
FIRST_SLOTS = 64
# Of the free device memory, the share that the base model's keys and values may take.
KEYS_SHARE = 0.2
# Logits that are held at once, in elements.
LOGITS_AT_ONCE = 2**27


@dataclass(frozen=True, slots=True)
class _Opening:
    """The first round of some rows, arranged."""

    batches: list[TreeBatch]
    asked: Int[Tensor, "rows draft_and_one"]
    """Nodes after which a row's new tokens are chosen: its prompt's end, then its draft's."""
    draft: Int[Tensor, "rows draft"]  # tokens of the draft; minus one where it is shorter


class Answerer:
    """Answers to the rows of a worker, trial after trial.

    Up to `deepest`, the last block that may be edited, the base model's keys and values are kept;
    it is -1 where the whole model may be another one.
    """

    def __init__(self, activations: PromptActivations, *, deepest: int) -> None:
        self.activations, self.tree = activations, activations.tree
        self.loaded, self.memory = activations.source.loaded, activations.source.memory
        self.trial_keys = KeyValues(self.tree.n_nodes)
        """Keys of the blocks above the edit; each trial writes its own."""
        self.guesser = Guesser(activations.drafts)
        self._deepest = deepest
        self._openings: dict[object, _Opening] = {}

    def prepare(self) -> None:
        """Compute what is kept of the model; it must be the base model, unlike later."""
        _ = self.kept_keys

    def begin(self, rules: AnswerRules) -> AnsweringRun:
        """Begin to answer with the model as it is now."""
        return AnsweringRun(self, rules)

    @cached_property
    def kept_keys(self) -> KeyValues | None:
        """Keys and values of the blocks that may lie below an edit, where they fit."""
        if self._deepest < 0:
            return None
        size = self.tree.n_nodes * key_bytes(self.loaded) * (self._deepest + 1)
        if size > self.memory.free_bytes() * KEYS_SHARE:
            return None

        def compute(budget: int) -> KeyValues:
            keys, device = KeyValues(self.tree.n_nodes), self.loaded.device
            for batch in arrange(self.tree, range(self.tree.n_rows), budget=budget, device=device):
                tree_forward(self.loaded, batch, 0, None, keys, stop=self._deepest + 1)
            return keys

        return self.forward_size.fit(compute)

    @cached_property
    def forward_size(self) -> BatchSize:
        """Prefixes in one forward of the first round."""
        return sweep_batch(self.loaded, self.memory, 4)

    def opening(
        self, rows: tuple[int, ...], before: tuple[tuple[int, ...], ...], budget: int
    ) -> _Opening:
        """Arrange the first round of some rows, once for all trials.

        `before` was opened before in the same evaluation; a forward has `budget` prefixes.
        """
        key = (rows, before, budget)
        if key in self._openings:
            return self._openings[key]
        tree, device = self.tree, self.loaded.device
        lengths, drafts = self.activations.prompt_lengths, self.activations.drafts
        said = [torch.tensor(drafts[row], dtype=torch.int64) for row in rows]
        draft = pad_sequence(said, batch_first=True, padding_value=-1)
        ends = torch.tensor([tree.offsets[row] + lengths[row] - 1 for row in rows])
        counts = torch.tensor(list(map(len, said)))
        places = ends[:, None] + torch.arange(draft.shape[1] + 1).minimum(counts[:, None])
        done = {node for earlier in before for node in tree.nodes_of(earlier).tolist()}
        batches = arrange(
            tree, rows, budget=budget, device=device, done=done, asked=self._asked_nodes
        )
        asked = tree.nodes[places].to(device)
        self._openings[key] = _Opening(batches=batches, asked=asked, draft=draft.to(device))
        return self._openings[key]

    @cached_property
    def _asked_nodes(self) -> set[int]:
        """The nodes after which any row's answer is chosen: the prompts' ends and the drafts."""
        tree, lengths = self.tree, self.activations.prompt_lengths
        return {
            node
            for row in range(tree.n_rows)
            for node in tree.nodes_of([row])[lengths[row] - 1 :].tolist()
        }

    @cached_property
    def decode_size(self) -> BatchSize:
        """Rows that are decoded together."""
        slots = max(self.activations.prompt_lengths) + FIRST_SLOTS
        return BatchSize(affordable_rows(self.loaded, self.memory, slots=slots), "the answers")


class AnsweringRun:
    """Answers of the model as it is now, by what an `Answerer` keeps from run to run."""

    def __init__(self, answerer: Answerer, rules: AnswerRules) -> None:
        self._answerer, self._rules = answerer, rules
        self._tree, self._loaded = answerer.tree, answerer.loaded
        self._start = 0 if rules.edited_layer is None else rules.edited_layer + 1
        self._opened: tuple[tuple[int, ...], ...] = ()
        self._answers: dict[int, list[int]] = {}
        self._pending: dict[int, list[int]] = {}
        self._chosen = torch.zeros_like(self._tree.ids, device=self._loaded.device)
        """The token that the model chooses after each node that is asked."""

    @torch.inference_mode()
    def open(self, rows: Sequence[int]) -> Mapping[int, list[int]]:
        """Compute prompts and check drafts; return the answers that are known by that.

        Each row is opened once.
        """
        if not rows:
            return {}
        opening = self._answerer.forward_size.fit(lambda size: self._first_round(tuple(rows), size))
        self._opened = (*self._opened, tuple(rows))
        budget, eos, stop = self._rules.max_new_tokens, self._loaded.eos_ids, self._rules.stop
        chosen = self._chosen[opening.asked]
        agrees = chosen[:, :-1] == opening.draft
        counts = (agrees.long().cumprod(1).sum(1) + 1).clamp(max=budget)
        table = torch.cat([counts[:, None], chosen], dim=1).tolist()
        said = [row[1 : 1 + row[0]] for row in table]
        tokens = [until_end(row, eos) for row in said]
        on = [i for i, row in enumerate(said) if len(tokens[i]) == len(row) < budget]
        if stop is not None and on:
            stopped = stop([rows[i] for i in on], [tokens[i] for i in on])
            on = [i for i, done in zip(on, stopped, strict=True) if not done]
        self._pending |= {rows[i]: tokens[i] for i in on}
        known = {row: tokens[i] for i, row in enumerate(rows) if row not in self._pending}
        self._answers |= known
        return known

    @torch.inference_mode()
    def close(self) -> Mapping[int, list[int]]:
        """Decode what is open to its end; return the answers to all rows opened so far."""
        if self._pending:
            # Rows of one length leave together; long ones do not make short ones wait.
            lengths = self._answerer.activations.prompt_lengths
            order = sorted(self._pending, key=lambda row: lengths[row])
            answers = self._answerer.decode_size.fit(lambda most: self._decode(order, most))
            for row, answer in answers.items():
                self._answerer.guesser.remember(row, answer)
            self._answers |= answers
            self._pending = {}
        return dict(self._answers)

    @cached_property
    def _stream(self) -> Float[Tensor, "nodes d_model"] | None:
        """The stream above the edited block: only what its MLP adds is computed."""
        if (layer := self._rules.edited_layer) is None:
            return None
        reads = self._answerer.activations.reads(layer)
        projection = self._loaded.layout.down_projection_of(self._loaded.model, layer)
        added: Tensor = projection(reads.inputs)
        return reads.residual + added  # rounded twice, as in the block

    def _first_round(self, rows: tuple[int, ...], budget: int) -> _Opening:
        opening = self._answerer.opening(rows, self._opened, budget)
        keys = self._answerer.trial_keys
        for batch in opening.batches:
            hidden = tree_forward(self._loaded, batch, self._start, self._stream, keys)
            self._chosen[batch.nodes[batch.asked]] = self._choose(hidden)
        return opening

    def _choose(self, hidden: Float[Tensor, "places d_model"]) -> Int[Tensor, " places"]:
        """Return the likeliest next token at each place, a bounded number of logits at a time."""
        head = self._loaded.model.get_output_embeddings()
        step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        return torch.cat([likeliest(head(part)) for part in hidden.split(step)])

    def _decode(self, order: Sequence[int], most: int) -> dict[int, list[int]]:
        lengths = self._answerer.activations.prompt_lengths
        answers: dict[int, list[int]] = {}
        for first in range(0, len(order), most):
            said = {row: self._pending[row] for row in order[first : first + most]}
            held = [lengths[row] + len(tokens) - 1 for row, tokens in said.items()]
            cache = SlotCache(len(said), max(held) + min(self._rules.max_new_tokens, FIRST_SLOTS))
            self._fill(cache, list(said), held)
            decoding = SlotDecoding(
                self._loaded, cache, said, held, rules=self._rules, guesser=self._answerer.guesser
            )
            answers |= decoding.run()
        return answers

    def _fill(self, cache: SlotCache, rows: Sequence[int], held: Sequence[int]) -> None:
        """Give rows the keys and values of their prompts and of what they have said so far."""
        device, computed = self._loaded.device, self._answerer.trial_keys
        below = self._answerer.kept_keys
        if self._start and (below is None or self._start > len(below.keys)):
            # The edit lies above what is kept, so that is computed for these rows alone.
            below = computed
            budget = self._answerer.forward_size.size
            for batch in arrange(self._tree, rows, budget=budget, device=device, lengths=held):
                tree_forward(self._loaded, batch, 0, None, computed, stop=self._start)
        nodes = self._tree.nodes_of(rows, held).to(device)
        row_index = torch.arange(len(rows)).repeat_interleave(torch.tensor(held)).to(device)
        positions = torch.cat([torch.arange(length) for length in held]).to(device)
        for layer in range(self._loaded.n_layers):
            source = computed if layer >= self._start or below is None else below
            keys, values = source.keys[layer][nodes], source.values[layer][nodes]
            cache.put(layer, (row_index, positions), keys, values)
