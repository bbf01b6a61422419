"""Rows decoded to their end, in one batch: several tokens at a time where the next can be guessed.

A guess at what a row says next is computed in one forward and taken as far as the model would have
chosen it, so the tokens are those of decoding one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lunar_tune.engine.answer_rules import AnswerRules
from lunar_tune.engine.guessing import Guesser
from lunar_tune.engine.slots import SlotCache

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = ["SlotDecoding", "likeliest", "until_end"]

# Steps between looks at which rows have ended: a look is a synchronisation on a GPU.
STEPS_PER_LOOK = {"cpu": 1, "cuda": 8}
# Steps between looks at what rows have said, which is text and lists on the host.
STEPS_PER_READING = 4
# Tokens that are guessed at once: few at first, more while the guesses hold.
FEWEST_GUESSED, MOST_GUESSED = 8, 64
# The share of rows that must have a guess: the others' places in the forward are wasted.
SHARE_WITH_GUESS = 0.5
# Tokens in one forward above which guessing costs more than it saves.
TOKENS_PER_GUESS = {"cpu": 128, "cuda": 4096}


class SlotDecoding:
    """Rows that are decoded together.

    Args:
        loaded: The model.
        cache: Keys and values of what the rows hold, all blocks.
        rows: Their numbers.
        tokens: What each has said so far, at least one token.
        held: Tokens of each row in the cache: its prompt and all it has said but the last token.
        rules: Of this run.
        guesser: Guesses at what a row says next.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: SlotCache,
        *,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        held: Sequence[int],
        rules: AnswerRules,
        guesser: Guesser,
    ) -> None:
        self._loaded, self._cache, self._rules = loaded, cache, rules
        self._guesser = guesser
        self._rows = list(rows)
        device, budget = loaded.device, rules.max_new_tokens
        self._eos = torch.tensor(loaded.eos_ids, device=device)
        # One place more than the budget takes what an ended row says until it leaves.
        said = [[*row, *[0] * (budget + 1 - len(row))] for row in tokens]
        self._tokens: Int[Tensor, "rows budget_and_one"] = torch.tensor(said, device=device)
        self._counts = torch.tensor([len(row) for row in tokens], device=device)
        self._positions = torch.tensor(list(held), device=device)
        self._ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self._width = max(held)
        """Slots in use, at most."""

    def run(self) -> dict[int, list[int]]:
        """Decode until every row is done; return tokens by row."""
        look = STEPS_PER_LOOK.get(self._loaded.device.type, 1)
        answers: dict[int, list[int]] = {}
        step, guessed = 0, 0
        while self._rows:
            reads = step % STEPS_PER_READING == 0 or guessed > 0
            if reads or step % look == 0:
                answers |= self._let_go(asks=reads)
            guesses = self._guesses(guessed) if reads and self._rows else []
            guessed = len(guesses[0]) if guesses else 0
            if self._rows:
                self._advance(
                    torch.tensor(guesses, device=self._tokens.device) if guesses else None
                )
            step += 1
        return answers

    def _advance(self, guesses: Int[Tensor, "rows guessed"] | None) -> None:
        """Choose the next token of each row, and the ones after it as far as guesses hold."""
        count, budget = len(self._rows), self._rules.max_new_tokens
        last = self._tokens[:count].gather(1, self._counts[:count, None] - 1)
        inputs = last if guesses is None else torch.cat([last, guesses], dim=1)
        seq = inputs.shape[1]
        self._width += seq
        if self._width > self._cache.slots:
            self._cache.grow(max(self._width, 2 * self._cache.slots))
        ahead = torch.arange(seq, device=inputs.device)
        positions = (self._positions[:count, None] + ahead).clamp(max=self._cache.slots - 1)
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
        places = self._counts[:count, None] + ahead
        kept = torch.where(taken & (places < budget), places, budget)
        self._tokens[:count].scatter_(1, kept, chosen)
        ends = torch.isin(chosen, self._eos) & taken
        self._counts[:count] = (self._counts[:count] + holds + 1).clamp(max=budget)
        self._positions[:count] += holds + 1
        self._ended[:count] |= ends.any(1) | (self._counts[:count] >= budget)

    def _let_go(self, *, asks: bool) -> dict[int, list[int]]:
        """Take out the rows that are done and return their tokens.

        Args:
            asks: Whether to ask the rules' stop as well.
        """
        count = len(self._rows)
        ended = self._ended[:count].tolist()
        if asks:
            self._width = int(self._positions[:count].max())
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
        holes = [i for i in leaving if i < stay]
        movers = [i for i in range(stay, count) if not ended[i]]
        for hole, mover in zip(holes, movers, strict=True):
            self._rows[hole] = self._rows[mover]
        del self._rows[stay:]
        if holes:
            for state in (self._tokens, self._counts, self._positions, self._ended):
                state[holes] = state[movers]
        self._cache.keep(holes, movers, stay)
        return answers

    def _guesses(self, before: int) -> list[list[int]]:
        """Return guesses at what the rows say next, all of one length, or none.

        Args:
            before: How many tokens were guessed in the last step; 0 for none.
        """
        said = self._said(range(len(self._rows)))
        most = TOKENS_PER_GUESS.get(self._loaded.device.type, TOKENS_PER_GUESS["cpu"])
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


def likeliest(logits: Float[Tensor, "*places vocabulary"]) -> Int[Tensor, "*places"]:
    """Return the first of the likeliest tokens; on a CPU `max` takes a third of `argmax`'s time."""
    return logits.max(-1).indices


def until_end(row: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """Return a row's tokens before its first end-of-sequence token."""
    end = next((place for place, token in enumerate(row) if token in eos_ids), len(row))
    return list(row[:end])
