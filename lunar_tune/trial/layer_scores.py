"""The paper's choice of a layer, without training.

Cost: one greedy decoding of the rows for each layer and one for the base model, all rows in
one batch, plus embedding the answers. What lies below block l is computed again for every layer:
at a few dozen rows a prompt costs about as much as one decoding step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from lunar_tune.data.records import Record
from lunar_tune.data.splits import sample_by_edge
from lunar_tune.engine.decoding import generate_tokens, token_budget
from lunar_tune.errors import InputError
from lunar_tune.methods.contract import Method
from lunar_tune.methods.lunar.steering import steered
from lunar_tune.methods.method_registry import METHODS
from lunar_tune.metrics.embedding import Embedder, StateEmbedder
from lunar_tune.metrics.refusal import Refusals, truth_similarity
from lunar_tune.models.device import BatchSize
from lunar_tune.models.layout import check_layers
from lunar_tune.trial.worker import Worker

__all__ = [
    "DEFAULT_ROWS",
    "RECOMMENDED_SHARE",
    "Answers",
    "LayerScore",
    "LayerScores",
    "check_coefficient",
    "check_has_layers",
    "layer_scores",
]

DEFAULT_ROWS = 20  # an edge of PISTOL, an author of TOFU
# A layer is recommended if it gains this share of what the best one gains over the base model.
# A share, since similarities stretch differently with every model and embedding.
RECOMMENDED_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Answers to the questions to forget, and how they look."""

    texts: tuple[str, ...]
    s1: float
    """Mean similarity to the refusals; see `Refusals.quality`."""
    s2: float
    """Mean similarity to the true answers; see `truth_similarity`."""
    unfinished: int
    """Answers that spend their token budget. A vector that is added too strongly makes a model
    repeat itself, which is like neither refusal nor truth, and which the score does not punish."""

    @property
    def score(self) -> float:
        """s1 − s2; higher is better."""
        return self.s1 - self.s2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScore:
    """One layer."""

    layer: int
    answers: Answers
    """Given while c·r_l was added after its block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScores:
    """The curve over the layers, and what it advises."""

    unmodified: Answers
    """Without anything added."""
    layers: tuple[LayerScore, ...]
    """In ascending order."""
    records: tuple[Record, ...]
    """What was asked."""
    coefficient: float
    max_new_tokens: int
    """Token budget of an answer."""
    embedding: str
    """Name of the embedder."""

    @property
    def best(self) -> int:
        """The layer with the highest s1 − s2, the lowest one on a tie."""
        return max(self.layers, key=lambda one: (one.answers.score, -one.layer)).layer

    @property
    def recommended(self) -> tuple[int, ...]:
        """The layers that gain `RECOMMENDED_SHARE` of what the best gains over the unmodified.

        If even the best one gains nothing there is nothing to recommend but itself.
        """
        start = self.unmodified.score
        gain = max(one.answers.score for one in self.layers) - start
        if gain <= 0:
            return (self.best,)
        least = start + RECOMMENDED_SHARE * gain
        return tuple(
            one.layer for one in self.layers if one.answers.score >= least or one.layer == self.best
        )


def layer_scores(
    worker: Worker,
    *,
    coefficient: float,
    layers: Sequence[int] | None = None,
    rows: int = DEFAULT_ROWS,
    embedder: Embedder | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> LayerScores:
    """Ask the questions to forget with c·r_l added after each block in turn, and score the answers.

    The model's weights are not touched.

    Args:
        worker: Whose method is LUNAR.
        coefficient: c, as in a trial.
        layers: Which blocks; None takes all.
        rows: Questions that are asked, drawn by edge from those to forget if there are more.
        embedder: Of the answers; None takes the model's own states.
        on_layer: Called with the answer sets done and their total, the base model's included.

    Raises:
        InputError: The method has no layers, the model lacks one, or a number is out of range.
    """
    check_has_layers(worker.spec.method)
    check_coefficient(coefficient)
    loaded = worker.loaded
    chosen = tuple(sorted(range(loaded.n_layers) if layers is None else layers))
    if not chosen:
        raise InputError("--range layer: none is named.")
    check_layers(chosen, loaded.n_layers, option="--range layer")
    asking = _Asking(worker, rows, embedder)
    vectors = worker.preparation.vectors  # type: ignore[attr-defined] # checked above
    total = len(chosen) + 1
    report = on_layer or (lambda _done, _total: None)
    report(0, total)
    unmodified = asking.ask(nullcontext())
    report(1, total)
    scored = []
    for done, layer in enumerate(chosen, start=2):
        answers = asking.ask(steered(loaded, layer, coefficient * vectors[layer]))
        scored.append(LayerScore(layer=layer, answers=answers))
        report(done, total)
    return LayerScores(
        unmodified=unmodified,
        layers=tuple(scored),
        records=asking.records,
        coefficient=coefficient,
        max_new_tokens=asking.max_new_tokens,
        embedding=asking.embedder.name,
    )


def check_has_layers(method: Method) -> None:
    """Refuse a method that does not choose a layer.

    Raises:
        InputError: It is not LUNAR.
    """
    if not METHODS[method.name].along_vectors:
        raise InputError(
            f"--method {method.name}: has no unlearning vector whose layer could be chosen. Layers "
            "are scored for --method lunar."
        )


def check_coefficient(coefficient: float) -> None:
    """Refuse a coefficient that means nothing.

    Raises:
        InputError: It is 0, infinite or NaN.
    """
    if coefficient == 0 or not math.isfinite(coefficient):
        raise InputError(f"coefficient {coefficient}: a finite number other than 0.")


class _Asking:
    """What is the same for all layers: questions, budget, embedder."""

    def __init__(self, worker: Worker, rows: int, embedder: Embedder | None) -> None:
        if rows < 1:
            raise InputError(f"--evaluation-rows {rows}: at least 1.")
        spec = worker.spec
        if not spec.data.refusals:
            raise InputError("--refusals: there is none, and answers are compared with them.")
        self.records = sample_by_edge(spec.data.forget, rows, seed=spec.seed)
        self._truths = [record.answer for record in self.records]
        self._prompts = worker.encoder.prompts([record.question for record in self.records])
        self._loaded = worker.loaded
        self.max_new_tokens = token_budget(
            spec.max_new_tokens, self._loaded.tokenizer, self._truths
        )
        self._batch = BatchSize(len(self._prompts), "the answers")
        self.embedder = embedder or StateEmbedder(
            self._loaded,
            context=worker.encoder.prompts([""])[0],
            centre=(*spec.data.refusals, *self._truths),
        )
        self._refusals = Refusals(self.embedder, spec.data.refusals)

    def ask(self, changed: AbstractContextManager[None]) -> Answers:
        """Answer inside a context; score outside it, with the model as it was."""
        with changed:
            tokens = self._batch.fit(self._answer)
        decode = self._loaded.tokenizer.batch_decode
        texts = tuple(decode(tokens, skip_special_tokens=True))
        return Answers(
            texts=texts,
            s1=self._refusals.quality(texts),
            s2=truth_similarity(self.embedder, texts, self._truths),
            unfinished=sum(len(answer) == self.max_new_tokens for answer in tokens),
        )

    def _answer(self, size: int) -> list[list[int]]:
        return generate_tokens(
            self._loaded, self._prompts, max_new_tokens=self.max_new_tokens, batch_size=size
        )
