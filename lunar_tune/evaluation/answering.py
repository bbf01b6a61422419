"""Greedy answers from what is known of the unmodified model: each prompt is computed once.

Covers: prefill above the edited block from kept streams; common beginnings of prompts computed once;
the unmodified model's own answer checked in the same forward (greedy speculative decoding: what the
edited model would choose at each of its places is known at once, and the answer is taken up to the
first place where it would choose otherwise); the rows that deviate decoded step by step, in as few
batches as fit, rows that are done leaving.
Does not cover: families or settings for which this is not possible (`decoding` serves those);
scores (`evaluate`).

Everything here gives the tokens of plain greedy decoding, up to rounding: a batch of another shape
adds in another order. In float32 that hardly ever decides between two tokens; in bfloat16 it may.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from lunar_tune.activations.prefixes import group_rows
from lunar_tune.activations.prompts import PromptActivations
from lunar_tune.activations.streams import KeptKeys, capture_keys, sweep_batch
from lunar_tune.evaluation.slots import SlotCache
from lunar_tune.memory import BatchSize
from lunar_tune.models.layout import decoder_slice, why_not_resumable

if TYPE_CHECKING:
    from lunar_tune.evaluation.finished import RecallStop
    from lunar_tune.models.loading import LoadedModel

__all__ = ["AnswerRules", "Answerer", "OpenRows"]

# Steps between looks at which rows have ended: a look is a synchronisation on a GPU.
STEPS_PER_LOOK = {"cpu": 1, "cuda": 8}
# Steps between looks at which rows have said their truth, which decodes text on the host.
STEPS_PER_RECALL_LOOK = 8
# Slots for new tokens before a cache grows for the first time; most answers are shorter.
FIRST_SLOTS = 64
# Of the free device memory, the share that kept keys and values may take.
KEYS_SHARE = 0.3
# Logits that are held at once, in elements.
LOGITS_AT_ONCE = 2**27
# Padded tokens in one forward of the first round.
TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 32768}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRules:
    """What holds for all answers of one evaluation."""

    edited_layer: int | None
    """The block whose down-projection is changed, with nothing below it and nothing else in it;
    None computes everything anew."""
    max_new_tokens: int
    """Token budget of an answer."""
    stop: RecallStop | None = None
    """Tells which rows need not go on; None lets all of them go on."""


@dataclass(slots=True)
class OpenRows:
    """Rows after their first round: some are answered, others are still to be decoded."""

    answers: dict[int, list[int]] = field(default_factory=dict)
    """Tokens of the rows that are done, cut before the first end-of-sequence token."""
    pending: list[_Pending] = field(default_factory=list)
    unasked: list[int] = field(default_factory=list)
    """Rows of which nothing is computed yet."""

    def waiting(self) -> list[int]:
        """Return the rows that are begun and not done."""
        return [*self.unasked, *(row for part in self.pending for row in part.rows)]


@dataclass(slots=True)
class _Pending:
    """Rows of one forward that are not done: what they have said and their keys and values."""

    rows: list[int]
    tokens: list[list[int]]
    """New tokens so far, at least one each."""
    cache: SlotCache
    """Of the blocks that the first round computed."""
    index: list[int]
    """Each row's place in `cache`."""


@dataclass(frozen=True, slots=True)
class _Forward:
    """The tokens of one forward of the first round, as tensors on the device."""

    rows: tuple[int, ...]
    nodes: Int[Tensor, "batch seq"]
    ids: Int[Tensor, "batch seq"]
    positions: Int[Tensor, "batch seq"]
    """`slots` for padding."""
    slots: int
    group: Int[Tensor, " batch"]
    """Which shared beginning a row goes on from."""
    shared: int
    """Slots of the longest shared beginning in this forward."""
    asked: Int[Tensor, "batch draft_and_one"]
    """Places in `seq` after which a new token is chosen: the prompt's last token, then the draft's."""
    draft: Int[Tensor, "batch draft"]
    """Tokens of the draft; −1 where it is shorter."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How rows are computed in the first round."""

    beginnings: tuple[_Forward, ...]
    """Shared beginnings, group after group; they choose nothing."""
    n_groups: int
    longest: int
    """Slots of the longest shared beginning."""
    forwards: tuple[_Forward, ...]


class Answerer:
    """Answers to the rows of a worker, trial after trial.

    Args:
        activations: Of the unmodified model on these rows.
        deepest: The last block that may be edited: so many blocks' keys and values are kept.
        batch_size: Rows decoded together; None takes as many as fit.
    """

    def __init__(
        self, activations: PromptActivations, *, deepest: int, batch_size: int | None = None
    ) -> None:
        self._activations = activations
        self._loaded: LoadedModel = activations.source.loaded
        self._deepest = deepest
        self._asked_size = batch_size
        self._plans = lru_cache(maxsize=64)(self._plan)
        self._eos = torch.tensor(self._loaded.eos_ids, device=self._loaded.device)

    def why_not(self, max_new_tokens: int) -> str | None:
        """Say why these rows must be decoded plainly; None where they need not."""
        longest = max(self._activations.prompt_lengths) + max_new_tokens
        return why_not_resumable(self._loaded.model.config, longest)

    def prepare(self) -> None:
        """Compute what is kept of the model; it must be unmodified, unlike later."""
        _ = self._keys

    @torch.inference_mode()
    def open(self, rows: Sequence[int], rules: AnswerRules) -> OpenRows:
        """Compute prompts and check drafts; return what is answered and what is not.

        Args:
            rows: Rows of the activations, each once.
            rules: Of this evaluation.
        """
        layer = rules.edited_layer
        start = 0 if layer is None else layer + 1
        plan = self._plans(tuple(rows), min(rules.max_new_tokens, self._longest_draft))
        streams = None if layer is None else self._above(layer)
        shared = SlotCache(plan.n_groups, plan.longest)
        done = 0
        for forward in plan.beginnings:
            self._compute(forward, start, streams, shared, first_row=done)
            done += len(forward.rows)
        opened = OpenRows()
        for forward in plan.forwards:
            cache = SlotCache(len(forward.rows), forward.slots)
            self._share(shared, forward, cache)
            hidden = self._compute(forward, start, streams, cache)
            tokens, goes_on = self._check(forward, hidden, rules.max_new_tokens)
            self._sort_out(forward.rows, tokens, goes_on, cache, rules.stop, opened)
        return opened

    @torch.inference_mode()
    def close(self, opened: Sequence[OpenRows], rules: AnswerRules) -> dict[int, list[int]]:
        """Decode what is open to its end; return the answers of all rows.

        Args:
            opened: From `open`, with the same rules.
            rules: Of this evaluation.
        """
        answers = {row: tokens for one in opened for row, tokens in one.answers.items()}
        pending = [
            (part, i) for one in opened for part in one.pending for i in range(len(part.rows))
        ]
        size = self._decode_batch(rules.max_new_tokens)

        def decode(most: int) -> dict[int, list[int]]:
            decoded: dict[int, list[int]] = {}
            for first in range(0, len(pending), most):
                batch = self._batch(pending[first : first + most], rules)
                decoded |= batch.run(rules.stop)
            return decoded

        return answers | size.fit(decode)

    @cached_property
    def _longest_draft(self) -> int:
        return max(map(len, self._activations.drafts), default=0)

    @cached_property
    def _keys(self) -> KeptKeys | None:
        """Keys and values of the blocks that may lie below an edit, where they fit."""
        loaded, memory = self._loaded, self._activations.source.memory
        config = loaded.model.config
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        n_blocks = self._deepest + 1
        size = 2 * self._activations.tree.n_nodes * heads * head_dim * n_blocks
        if size * loaded.model.dtype.itemsize > memory.free_bytes() * KEYS_SHARE:
            return None
        return capture_keys(
            loaded, self._activations.tree, n_blocks, sweep_batch(loaded, memory, 0), loaded.device
        )

    def _above(self, layer: int) -> Float[Tensor, "nodes d_model"]:
        """Return the stream above the edited block: what its MLP adds is computed anew."""
        reads = self._activations.reads(layer)
        weight = self._loaded.layout.down_projection_of(self._loaded.model, layer).weight
        return reads.residual + linear(reads.inputs, weight)

    def _plan(self, rows: tuple[int, ...], draft: int) -> _Plan:
        """Arrange rows: groups with a shared beginning, then forwards of similar length."""
        tree, lengths = self._activations.tree, self._activations.prompt_lengths
        # A row's last prompt token is always computed for itself: an answer is chosen after it.
        found = group_rows([tree.sequences[row] for row in rows], [lengths[r] - 1 for r in rows])
        found.sort(key=lambda group: group.shared)
        alone = [group for group in found if not group.shared]
        grouped = [group for group in found if group.shared]
        shared_of = {rows[i]: group.shared for group in found for i in group.rows}
        group_of = {rows[i]: number for number, group in enumerate(grouped) for i in group.rows}
        group_of |= {rows[i]: 0 for group in alone for i in group.rows}
        leaders = [(rows[group.rows[0]], 0, group.shared) for group in grouped]
        drafts = {row: self._activations.drafts[row][:draft] for row in rows}
        parts = [(row, shared_of[row], lengths[row] + len(drafts[row])) for row in rows]
        parts.sort(key=lambda part: part[2] - part[1])
        return _Plan(
            beginnings=tuple(
                self._forward(part, {}, {}) for part in _cut(leaders, self._tokens_per_forward)
            ),
            n_groups=len(grouped),
            longest=max((group.shared for group in grouped), default=0),
            forwards=tuple(
                self._forward(part, group_of, drafts)
                for part in _cut(parts, self._tokens_per_forward)
            ),
        )

    @cached_property
    def _tokens_per_forward(self) -> int:
        """Padded tokens in one forward: what fits beside the weights, estimated."""
        most = TOKENS_PER_FORWARD.get(self._loaded.device.type, TOKENS_PER_FORWARD["cpu"])
        return min(most, sweep_batch(self._loaded, self._activations.source.memory, 4).size)

    def _forward(
        self,
        parts: Sequence[tuple[int, int, int]],
        group_of: Mapping[int, int],
        drafts: Mapping[int, tuple[int, ...]],
    ) -> _Forward:
        """Return tokens `low` to `high` − 1 of each row, right-padded."""
        tree, device = self._activations.tree, self._loaded.device
        slots = max(high for _, _, high in parts)
        seq = max(high - low for _, low, high in parts)
        offsets = tree.offsets.tolist()
        nodes, ids, positions, asked, draft = [], [], [], [], []
        longest = max((len(drafts.get(row, ())) for row, _, _ in parts), default=0)
        for row, low, high in parts:
            padding = seq - (high - low)
            nodes.append(tree.nodes[offsets[row] + low : offsets[row] + high].tolist())
            nodes[-1] += [0] * padding
            ids.append([*tree.sequences[row][low:high], *[self._loaded.pad_id] * padding])
            positions.append([*range(low, high), *[slots] * padding])
            tokens = drafts.get(row, ())
            first = high - low - 1 - len(tokens)
            asked.append([first + min(i, len(tokens)) for i in range(longest + 1)])
            draft.append([*tokens, *[-1] * (longest - len(tokens))])

        def tensor(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return _Forward(
            rows=tuple(row for row, _, _ in parts),
            nodes=tensor(nodes),
            ids=tensor(ids),
            positions=tensor(positions),
            slots=slots,
            group=tensor([group_of.get(row, 0) for row, _, _ in parts]),
            shared=max((low for _, low, _ in parts), default=0),
            asked=tensor(asked),
            draft=tensor(draft).reshape(len(parts), longest),
        )

    def _compute(
        self,
        forward: _Forward,
        start: int,
        streams: Float[Tensor, "nodes d_model"] | None,
        cache: SlotCache,
        first_row: int = 0,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Run blocks `start` and above on a forward's tokens; return the normalised stream."""
        loaded = self._loaded
        mask = cache.at(forward.positions, width=forward.slots, first_row=first_row)
        given = {"input_ids": forward.ids} if streams is None else {
            "inputs_embeds": streams[forward.nodes]
        }
        with decoder_slice(loaded.model, loaded.layout, start, loaded.n_layers) as decoder:
            output = decoder(
                **given,
                attention_mask=mask,
                position_ids=forward.positions.clamp(max=forward.slots - 1),
                past_key_values=cache,
                use_cache=True,
            )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _share(self, shared: SlotCache, forward: _Forward, cache: SlotCache) -> None:
        """Give each row the keys and values of its group's beginning."""
        if not forward.shared:
            return
        for kept, beginnings in ((cache.keys, shared.keys), (cache.values, shared.values)):
            for layer, tensor in beginnings.items():
                cache.allocate(kept, layer, tensor)
                part = tensor[forward.group, : forward.shared]
                kept[layer][:, : forward.shared] = part

    def _check(
        self, forward: _Forward, hidden: Float[Tensor, "batch seq d_model"], max_new_tokens: int
    ) -> tuple[list[list[int]], list[bool]]:
        """Return each row's tokens as far as they are known, and whether it must go on."""
        rows = torch.arange(len(forward.rows), device=hidden.device)[:, None]
        chosen = self._choose(hidden[rows, forward.asked])
        agrees = chosen[:, :-1] == forward.draft
        known = agrees.long().cumprod(1).sum(1) + 1
        known.clamp_(max=max_new_tokens)
        places = torch.arange(chosen.shape[1], device=hidden.device)
        ends = torch.isin(chosen, self._eos) & (places < known[:, None])
        on = ~(ends.any(1) | (known >= max_new_tokens))
        table = torch.cat([known[:, None], on.long()[:, None], chosen], dim=1).tolist()
        tokens = [_until(row[2 : 2 + row[0]], self._loaded.eos_ids) for row in table]
        return tokens, [bool(row[1]) for row in table]

    def _choose(self, hidden: Float[Tensor, "batch places d_model"]) -> Int[Tensor, "batch places"]:
        """Return the likeliest token at each place, a bounded number of logits at a time."""
        head = self._loaded.model.get_output_embeddings()
        flat = hidden.flatten(0, 1)
        step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        chosen = [head(part).argmax(-1) for part in flat.split(step)]
        return torch.cat(chosen).reshape(hidden.shape[:2])

    def _sort_out(
        self,
        rows: Sequence[int],
        tokens: Sequence[list[int]],
        goes_on: Sequence[bool],
        cache: SlotCache,
        stop: RecallStop | None,
        opened: OpenRows,
    ) -> None:
        """Note the rows that are done, and keep what the others need."""
        places = [i for i, on in enumerate(goes_on) if on]
        if stop is not None and places:
            said = stop.done([rows[i] for i in places], [tokens[i] for i in places])
            places = [i for i, done in zip(places, said, strict=True) if not done]
        waiting = set(places)
        opened.answers |= {row: tokens[i] for i, row in enumerate(rows) if i not in waiting}
        if places:
            opened.pending.append(
                _Pending(
                    rows=[rows[i] for i in places],
                    tokens=[tokens[i] for i in places],
                    cache=cache,
                    index=places,
                )
            )

    def _decode_batch(self, max_new_tokens: int) -> BatchSize:
        """Return how many rows are decoded together: what was asked for, or what fits."""
        if self._asked_size is not None:
            return BatchSize(self._asked_size, "the answers")
        return self._found_size(min(max_new_tokens, FIRST_SLOTS))

    @cached_property
    def _sizes(self) -> dict[int, BatchSize]:
        return {}

    def _found_size(self, new_tokens: int) -> BatchSize:
        """Return a size estimated from a row's keys, values and logits, and remembered."""
        if new_tokens not in self._sizes:
            config = self._loaded.model.config
            slots = max(self._activations.prompt_lengths) + new_tokens
            width = config.num_key_value_heads * (
                getattr(config, "head_dim", None)
                or config.hidden_size // config.num_attention_heads
            )
            row = 2 * slots * width * self._loaded.n_layers * self._loaded.model.dtype.itemsize
            row += config.vocab_size * 8 + config.intermediate_size * 32
            free = self._activations.source.memory.free_bytes()
            self._sizes[new_tokens] = BatchSize(free // row, "the answers")
        return self._sizes[new_tokens]

    def _batch(self, chosen: Sequence[tuple[_Pending, int]], rules: AnswerRules) -> _Decoding:
        """Gather the keys and values of rows from where they are."""
        lengths = self._activations.prompt_lengths
        rows = [part.rows[i] for part, i in chosen]
        tokens = [part.tokens[i] for part, i in chosen]
        held = [lengths[row] + len(said) - 1 for row, said in zip(rows, tokens, strict=True)]
        cache = SlotCache(len(rows), max(held) + min(rules.max_new_tokens, FIRST_SLOTS))
        parts = {id(part): part for part, _ in chosen}
        for part in parts.values():
            places = [place for place, (other, _) in enumerate(chosen) if other is part]
            index = [part.index[i] for other, i in chosen if other is part]
            cache.take(places, part.cache, index)
        if rules.edited_layer is not None:
            self._fill_below(rules.edited_layer + 1, rows, held, cache)
        budget = rules.max_new_tokens
        return _Decoding(self._loaded, cache, rows, tokens, held, budget, self._eos)

    def _fill_below(
        self, n_blocks: int, rows: Sequence[int], held: Sequence[int], cache: SlotCache
    ) -> None:
        """Give rows the keys and values of the blocks below the edit, kept or computed."""
        keys = self._keys
        if keys is None:
            self._compute_below(n_blocks, rows, held, cache)
            return
        device = self._loaded.device
        nodes = self._activations.tree.nodes_of(rows, held).to(device)
        counts = torch.tensor(held)
        row_index = torch.arange(len(rows)).repeat_interleave(counts).to(device)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        positions = (torch.arange(int(counts.sum())) - starts).to(device)
        for layer in range(n_blocks):
            cache.fill(layer, row_index, positions, keys.keys[layer][nodes], keys.values[layer][nodes])

    def _compute_below(
        self, n_blocks: int, rows: Sequence[int], held: Sequence[int], cache: SlotCache
    ) -> None:
        loaded, tree = self._loaded, self._activations.tree
        widest = max(held)
        step = max(1, self._tokens_per_forward // widest)
        with decoder_slice(loaded.model, loaded.layout, 0, n_blocks) as decoder:
            for first in range(0, len(rows), step):
                part = list(zip(rows, held, strict=True))[first : first + step]
                ids = torch.tensor(
                    [
                        [*tree.sequences[row][:length], *[loaded.pad_id] * (widest - length)]
                        for row, length in part
                    ],
                    device=loaded.device,
                )
                places = torch.arange(widest, device=loaded.device)
                lengths = torch.tensor([length for _, length in part], device=loaded.device)
                positions = torch.where(places < lengths[:, None], places, cache.slots)
                decoder(
                    input_ids=ids,
                    attention_mask=cache.at(positions, width=widest, first_row=first),
                    position_ids=positions.clamp(max=widest - 1),
                    past_key_values=cache,
                    use_cache=True,
                )


class _Decoding:
    """Rows that are decoded a token at a time; those that are done leave."""

    def __init__(
        self,
        loaded: LoadedModel,
        cache: SlotCache,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        held: Sequence[int],
        max_new_tokens: int,
        eos: Int[Tensor, " ids"],
    ) -> None:
        self._loaded, self._cache, self._eos = loaded, cache, eos
        self._rows = list(rows)
        self._budget = max_new_tokens
        device = loaded.device
        # One place more than the budget takes what an ended row says until it leaves.
        said = [[*row, *[0] * (max_new_tokens + 1 - len(row))] for row in tokens]
        self._tokens = torch.tensor(said, device=device)
        self._counts = torch.tensor([len(row) for row in tokens], device=device)
        self._positions = torch.tensor(list(held), device=device)
        self._width = max(held) + 1
        self._ended = torch.zeros(len(rows), dtype=torch.bool, device=device)

    def run(self, stop: RecallStop | None) -> dict[int, list[int]]:
        """Decode until every row is done; return tokens by row."""
        look = STEPS_PER_LOOK.get(self._loaded.device.type, 1)
        answers: dict[int, list[int]] = {}
        step = 0
        while self._rows:
            if self._width > self._cache.slots:
                self._cache.grow(min(2 * self._cache.slots, self._cache.slots + self._budget))
            self._step()
            step += 1
            asks = stop is not None and step % STEPS_PER_RECALL_LOOK == 0
            if step % look == 0 or asks:
                answers |= self._let_go(stop if asks else None)
        return answers

    def _step(self) -> None:
        count = len(self._rows)
        last = self._tokens[:count].gather(1, self._counts[:count, None] - 1)
        positions = self._positions[:count, None]
        output = self._loaded.model(
            input_ids=last,
            attention_mask=self._cache.at(positions, width=self._width),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = output.logits[:, -1].argmax(-1)
        self._tokens[:count].scatter_(1, self._counts[:count, None], chosen[:, None])
        self._counts[:count] = (self._counts[:count] + 1).clamp(max=self._budget)
        self._ended[:count] |= torch.isin(chosen, self._eos) | (
            self._counts[:count] >= self._budget
        )
        self._positions[:count] = (self._positions[:count] + 1).clamp(max=self._cache.slots)
        self._width += 1

    def _let_go(self, stop: RecallStop | None) -> dict[int, list[int]]:
        """Take out the rows that are done and return their tokens."""
        count = len(self._rows)
        ended = self._ended[:count].tolist()
        if stop is not None:
            tokens = self._said(range(count))
            on = [i for i in range(count) if not ended[i]]
            said = stop.done([self._rows[i] for i in on], [tokens[i] for i in on])
            for i, done in zip(on, said, strict=True):
                ended[i] = done
        leaving = [i for i in range(count) if ended[i]]
        if not leaving:
            return {}
        answers = dict(
            zip([self._rows[i] for i in leaving], self._said(leaving), strict=True)
        )
        stay = count - len(leaving)
        holes = [i for i in leaving if i < stay]
        movers = [i for i in range(stay, count) if not ended[i]]
        for i, j in zip(holes, movers, strict=True):
            self._rows[i] = self._rows[j]
        del self._rows[stay:]
        if holes:
            for state in (self._tokens, self._counts, self._positions, self._ended):
                state[torch.tensor(holes)] = state[torch.tensor(movers)]
        self._cache.keep(holes, movers, stay)
        return answers

    def _said(self, places: Sequence[int]) -> list[list[int]]:
        """Return the tokens of some rows, cut before the first end-of-sequence token."""
        index = torch.tensor(list(places), device=self._tokens.device)
        counts = self._counts[index].tolist()
        rows = self._tokens[index, : max(counts)].tolist()
        return [
            _until(row[:length], self._loaded.eos_ids)
            for row, length in zip(rows, counts, strict=True)
        ]


def _cut(
    parts: Sequence[tuple[int, int, int]], budget: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield (row, low, high) in their order, in stretches bounded in padded tokens."""
    batch: list[tuple[int, int, int]] = []
    widest = 0
    for part in parts:
        width = max(widest, part[2] - part[1])
        if batch and width * (len(batch) + 1) > budget:
            yield batch
            batch, width = [], part[2] - part[1]
        batch.append(part)
        widest = width
    if batch:
        yield batch


def _until(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Cut a row before its first end-of-sequence token."""
    return row[: next((i for i, token in enumerate(row) if token in eos_ids), len(row))]

