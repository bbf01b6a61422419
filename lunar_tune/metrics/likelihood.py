"""How well a model knows the true answers, whatever it says: ranks and probabilities.

A token is judged after the question and the true tokens before it (teacher forcing). The published
code (src/eval_util.py at dfa56eb) takes ranks along the generated answer and, past its end, from
zeros. The token that ends an answer counts for log-probabilities and perplexity alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lunar_tune.engine.activations import batches_by_length, sweep_batch
from lunar_tune.engine.decoding import likeliest
from lunar_tune.errors import DivergenceError
from lunar_tune.metrics.means import mean, mean_scores
from lunar_tune.models.device import BatchSize, DeviceMemory
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training.answer_loss import Pair, answer_states, token_log_probs

HIT_RANK = 100  # src/eval_util.py of the published code at dfa56eb
LOGITS_AT_ONCE = 2**25  # held in float32, with what is computed from them about half a GiB
# What each answer has a score of.
QUANTITIES = ("mrr", "hit_ratio", "log_prob", "answer_log_prob", "extraction_strength")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLikelihood:
    """What a model makes of one answer, a true one or one that was generated."""

    ranks: tuple[int, ...]  # of each own token: 1 and the tokens of strictly greater logit
    chosen: tuple[bool, ...]  # whether greedy decoding takes each own token
    log_probs: tuple[float, ...]  # log π of each own token and, last, of the one that ends it
    entropies: tuple[float, ...]  # of the model's choice at each of these places, in nats

    @property
    def typicality(self) -> float:
        """How usual the answer's tokens are, once it has begun: the mean of log π + entropy.

        It is 0 on average for what the model samples, and above for what it is surer of; where a
        model is sure of everything, any other token counts (arXiv 2202.00666). How an answer begins
        is left out: by that a refusal differs from the answer that the model would have given.
        """
        places = list(zip(self.log_probs, self.entropies, strict=True))[1:]
        return mean([log_prob + entropy for log_prob, entropy in places]) if places else 0.0

    @property
    def scores(self) -> dict[str, float]:
        """The answer's score by quantity.

        Extraction strength is 1 − k/L for the shortest beginning of k own tokens after which the
        rest comes out. No answer is generated for it: as long as what came out is the truth, greedy
        decoding sees what teacher forcing shows it, so k is the number of places up to the last
        where the truth is not chosen.
        """
        given = max((k for k, chosen in enumerate(self.chosen, start=1) if not chosen), default=0)
        return {
            "mrr": mean([1 / rank for rank in self.ranks]),
            "hit_ratio": mean([float(rank <= HIT_RANK) for rank in self.ranks]),
            "log_prob": math.fsum(self.log_probs),  # of the answer with its end
            "answer_log_prob": mean(self.log_probs),  # of a token of it
            "extraction_strength": 1 - given / len(self.chosen) if self.chosen else math.nan,
        }


def likelihood_means(answers: Sequence[AnswerLikelihood]) -> dict[str, float]:
    """Return a set's scores by quantity, means over answers with errors; NaN of no answers.

    Perplexity alone is of the set's tokens, exp(−Σ log π / tokens), as a mean over answers would be
    the worst answer's. It ends at the largest float, so that it stays a number in every file.
    """
    nats = -mean([value for answer in answers for value in answer.log_probs])
    try:
        perplexity = math.exp(nats)
    except OverflowError:
        perplexity = sys.float_info.max
    scores = [answer.scores for answer in answers]
    means = {"perplexity": perplexity}
    for name in QUANTITIES:
        means |= mean_scores(name, [one[name] for one in scores])
    return means


class LikelihoodScorer:
    """Judges answers by the model as it is when asked, with batches that are remembered."""

    def __init__(self, loaded: LoadedModel, memory: DeviceMemory) -> None:
        self._loaded, self._memory = loaded, memory

    def score(self, pairs: Sequence[Pair]) -> tuple[AnswerLikelihood, ...]:
        """Return what the model makes of each pair's answer, or raise a DivergenceError."""
        return self._batch_size.fit(lambda tokens: self._score(pairs, tokens))

    @cached_property
    def _batch_size(self) -> BatchSize:
        """Tokens in one forward, padding included."""
        return sweep_batch(self._loaded, self._memory, 4)

    @torch.inference_mode()
    def _score(self, pairs: Sequence[Pair], tokens: int) -> tuple[AnswerLikelihood, ...]:
        decoder = self._loaded.layout.decoder_of(self._loaded.model)
        scored: dict[int, AnswerLikelihood] = {}
        for places in batches_by_length([len(pair) for pair in pairs], tokens):
            batch = [pairs[place] for place in places]
            states = answer_states(self._loaded.model, decoder, batch)
            ranks, chosen, log_probs, entropies = self._judged(states.hidden, states.targets)
            start = 0
            for place, pair in zip(places, batch, strict=True):
                end = start + len(pair.answer)
                scored[place] = AnswerLikelihood(
                    ranks=tuple(ranks[start : end - 1]),
                    chosen=tuple(chosen[start : end - 1]),
                    log_probs=tuple(log_probs[start:end]),
                    entropies=tuple(entropies[start:end]),
                )
                start = end
        return tuple(scored[place] for place in range(len(pairs)))

    def _judged(
        self, hidden: Float[Tensor, "tokens d_model"], targets: Int[Tensor, " tokens"]
    ) -> tuple[list[int], list[bool], list[float], list[float]]:
        """Return each token's rank, whether it is chosen, log π and entropy, a few at a time."""
        head = self._loaded.model.get_output_embeddings()
        step = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        parts = []
        for states, truth in zip(hidden.split(step), targets.split(step), strict=True):
            logits = head(states)
            ranks = 1 + (logits > logits.gather(1, truth[:, None])).sum(1)
            entropies = torch.special.entr(logits.float().softmax(1)).sum(1)
            chosen, log_probs = likeliest(logits) == truth, token_log_probs(logits, truth)
            parts.append((ranks, chosen, log_probs, entropies))
        ranks, chosen, log_probs, entropies = map(torch.cat, zip(*parts, strict=True))
        if not bool(log_probs.isfinite().all()):
            raise DivergenceError(
                "the model's logits are NaN or infinite where a true answer is judged."
            )
        return ranks.tolist(), chosen.tolist(), log_probs.tolist(), entropies.tolist()
