"""Rows decoded to their end, in one batch: several tokens at a time where the next can be guessed.

A guess at what a row says next is computed in one forward and taken as far as the model would have
chosen it, so the tokens are those of decoding one by one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from lunar_tune.engine.decoding import STEPS_PER_LOOK, AnswerRules, likeliest, until_end
from lunar_tune.engine.forward import KeyValues
from lunar_tune.engine.repetition import period_of
from lunar_tune.models.loading import LoadedModel

# Steps between looks at what rows have said, which is text and lists on the host.
STEPS_PER_READING = 4
# Tokens that are guessed at once: few at first, more while the guesses hold.
FEWEST_GUESSED, MOST_GUESSED = 8, 64
# The share of rows that must have a guess: the others' places in the forward are wasted.
SHARE_WITH_GUESS = 0.5
# Tokens in one forward above which guessing costs more than it saves.
TOKENS_PER_GUESS = {"cpu": 128, "cuda": 4096}
# A repetition has at most so many tokens; at least so many tokens in a row must repeat.
LONGEST_PERIOD, LEAST_REPEATED = 16, 4
# Different answers to one question that are remembered, the latest ones.
REMEMBERED = 8


class SlotCache(KeyValues):
    """Keys and values `[rows, slots, kv_heads, head_dim]` of every block, for transformers' models.

    A token's slot is its position, so what was written for a rejected draft is simply overwritten,
    and one mask serves every block: a query at position p sees slots 0 to p.
    """

    def __init__(self, rows: int, slots: int) -> None:
        super().__init__(rows, slots)
        self._positions = self._row_index = torch.zeros(0, dtype=torch.int64)
        self._width = slots

    def at(
        self, positions: Int[Tensor, "batch seq"], *, width: int
    ) -> Bool[Tensor, "batch 1 seq width"]:
        """Say which tokens the next forward computes, and return its attention mask.

        Each row of the cache has a line of positions; no query looks beyond `width` slots.
        """
        self._positions, self._width = positions, width
        self._row_index = torch.arange(len(positions), device=positions.device)[:, None]
        return torch.arange(width, device=positions.device) <= positions[:, None, :, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a block's new keys and values; return all that its queries may look at."""
        seen = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            slots = kept[layer_idx]
            slots[self._row_index, self._positions] = new.transpose(1, 2)
            seen.append(slots[: len(new), : self._width].transpose(1, 2))
        return seen[0], seen[1]

    @property
    def slots(self) -> int:
        """Tokens of a row that there is room for."""
        return self.shape[1]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Return the width; positions are given, so nothing is derived from it."""
        return self._width

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows leave; those that are not in their new place are moved there."""
        places = [place for place, row in enumerate(rows) if row != place]
        moved = torch.tensor([rows[place] for place in places])
        for tensor in (*self.keys.values(), *self.values.values()):
            if places:
                tensor[torch.tensor(places)] = tensor[moved]
        self.shape = (len(rows), self.slots)

    def grow(self, slots: int) -> None:
        """Make rows longer; the places of rows that have left are given up."""
        rows, before = self.shape
        for kept in (self.keys, self.values):
            for layer, tensor in kept.items():
                kept[layer] = pad(tensor[:rows], (0, 0, 0, 0, 0, slots - before))
        self.shape = (rows, slots)


class Guesser:
    """Guesses at what an answer says next, from known answers; never trusted."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        followers: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}
        for answer in answers:
            for place in range(1, len(answer)):
                rest = tuple(answer[place:])
                # At an answer's beginning one token says enough, later it takes two.
                said = (-1, answer[0]) if place == 1 else tuple(answer[place - 2 : place])
                followers.setdefault(said, Counter())[rest] += 1
        self._continuations = {
            said: counts.most_common(1)[0][0] for said, counts in followers.items()
        }
        self._remembered: dict[int, deque[tuple[int, ...]]] = {}

    def remember(self, row: int, answer: Sequence[int]) -> None:
        """Note what was answered to a question: another trial may well say the same."""
        latest = self._remembered.setdefault(row, deque(maxlen=REMEMBERED))
        said = tuple(answer)
        if said in latest:
            latest.remove(said)
        latest.appendleft(said)

    def guess(self, row: int, said: Sequence[int], length: int) -> list[int]:
        """Return at most `length` tokens that may come next; none where there is no guess."""
        begun = tuple(said)
        for answer in self._remembered.get(row, ()):
            if len(answer) > len(begun) and answer[: len(begun)] == begun:
                return list(answer[len(begun) : len(begun) + length])
        if period := period_of(said, longest=LONGEST_PERIOD, least=LEAST_REPEATED):
            return [said[len(said) - period + i % period] for i in range(length)]
        last = (-1, said[0]) if len(said) == 1 else tuple(said[-2:])
        return list(self._continuations.get(last, ())[:length])


class SlotDecoding:
    """Rows that are decoded together.

    `rows` is what each row, by its number, has said so far: at least one token. The cache has
    `held` tokens of each, in all blocks: its prompt and all it has said but the last token.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: SlotCache,
        rows: Mapping[int, Sequence[int]],
        held: Sequence[int],
        *,
        rules: AnswerRules,
        guesser: Guesser,
    ) -> None:
        self._loaded, self._cache, self._rules = loaded, cache, rules
        self._guesser = guesser
        self._rows = list(rows)
        device, budget = loaded.device, rules.max_new_tokens
        self._eos = torch.tensor(loaded.eos_ids, device=device)
        # One place more than the budget takes what an ended row says until it leaves.
        said = [[*row, *[0] * (budget + 1 - len(row))] for row in rows.values()]
        self._tokens: Int[Tensor, "rows budget_and_one"] = torch.tensor(said, device=device)
        self._counts = torch.tensor([len(row) for row in rows.values()], device=device)
        self._positions = torch.tensor(held, device=device)
        begun = zip(held, rows.values(), strict=True)
        self._last = budget + max(length - len(row) for length, row in begun)
        """A position behind every answer, where what a row says beyond its budget stands."""
        self._ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self._width = max(held)
        """Slots in use, at most."""

    def run(self) -> dict[int, list[int]]:
        """Decode until every row is done; return tokens by row."""
        look = STEPS_PER_LOOK[self._loaded.device.type]
        answers: dict[int, list[int]] = {}
        step, guessed = 0, 0
        while self._rows:
            reads = step % STEPS_PER_READING == 0 or guessed > 0
            if reads or step % look == 0:
                answers |= self._let_go(asks=reads)
            if self._rows:
                guesses = self._guesses(guessed) if reads else []
                guessed = len(guesses[0]) if guesses else 0
                self._advance(guesses)
            step += 1
        return answers

    def _advance(self, guesses: Sequence[Sequence[int]]) -> None:
        """Choose the next token of each row, and the ones after it as far as guesses hold."""
        budget = self._rules.max_new_tokens
        inputs = self._tokens.gather(1, self._counts[:, None] - 1)
        if guesses:
            inputs = torch.cat([inputs, torch.tensor(guesses, device=inputs.device)], dim=1)
        seq = inputs.shape[1]
        self._width += seq
        if self._width > self._cache.slots:
            self._cache.grow(max(self._width, 2 * self._cache.slots))
        ahead = torch.arange(seq, device=inputs.device)
        last = min(self._last, self._cache.slots - 1)
        positions = (self._positions[:, None] + ahead).clamp(max=last)
        output = self._loaded.model(
            input_ids=inputs,
            attention_mask=self._cache.at(positions, width=self._width),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        chosen = likeliest(output.logits)
        holds = (chosen[:, :-1] == inputs[:, 1:]).long().cumprod(1).sum(1)
        taken = ahead <= holds[:, None]
        places = self._counts[:, None] + ahead
        kept = torch.where(taken & (places < budget), places, budget)
        self._tokens.scatter_(1, kept, chosen)
        ends = torch.isin(chosen, self._eos) & taken
        self._counts = (self._counts + holds + 1).clamp(max=budget)
        self._positions += holds + 1
        self._ended |= ends.any(1) | (self._counts >= budget)

    def _let_go(self, *, asks: bool) -> dict[int, list[int]]:
        """Take out the rows that are done, those of the rules' `stop` too; return their tokens."""
        count, ended = len(self._rows), self._ended.tolist()
        if asks:
            self._width = int(self._positions.max())
        if asks and self._rules.stop is not None:
            on = [i for i in range(count) if not ended[i]]
            said = self._rules.stop([self._rows[i] for i in on], self._said(on))
            for i, done in zip(on, said, strict=True):
                ended[i] = done
        leaving = [i for i in range(count) if ended[i]]
        if not leaving:
            return {}
        answers = dict(zip([self._rows[i] for i in leaving], self._said(leaving), strict=True))
        stay = count - len(leaving)
        last = (i for i in range(stay, count) if not ended[i])  # they take the places of others
        order = [next(last) if ended[i] else i for i in range(stay)]
        self._rows = [self._rows[i] for i in order]
        self._tokens, self._counts = self._tokens[order], self._counts[order]
        self._positions, self._ended = self._positions[order], self._ended[order]
        self._cache.keep(order)
        return answers

    def _guesses(self, before: int) -> list[list[int]]:
        """Return guesses at what the rows say next, all of one length, or none.

        More are made where `before` were guessed in the last step.
        """
        said = self._said(range(len(self._rows)))
        most = TOKENS_PER_GUESS[self._loaded.device.type]
        length = min(max(FEWEST_GUESSED, 2 * before), MOST_GUESSED, most // len(said))
        length = min(length, self._rules.max_new_tokens - min(map(len, said)) - 1)
        if length < 1:
            return []
        guesses = [
            self._guesser.guess(row, tokens, length)
            for row, tokens in zip(self._rows, said, strict=True)
        ]
        if sum(map(bool, guesses)) < SHARE_WITH_GUESS * len(guesses):
            return []
        longest = max(map(len, guesses))
        return [[*guess, *[0] * (longest - len(guess))] for guess in guesses]

    def _said(self, places: Sequence[int]) -> list[list[int]]:
        """Return the tokens of some rows, cut before the first end-of-sequence token."""
        index = list(places)
        if not index:
            return []
        counts = self._counts[index].tolist()
        rows = self._tokens[index, : max(counts)].tolist()
        pairs = zip(rows, counts, strict=True)
        return [until_end(row[:length], self._loaded.eos_ids) for row, length in pairs]
