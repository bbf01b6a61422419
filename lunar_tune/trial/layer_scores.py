"""The paper's choice of a layer, without training, and the file in which a search finds it.

    {"format": "lunar-tune layer prior", "version": 1,
     "model": "tiny", "n_layers": 4, "best": 3, "recommended": [3],
     "data": "mini", "forget_edges": ["A_B"], "rows": 12, "coefficient": 0.5,
     "max_new_tokens": 32, "seed": 0, "embedding": "own states after block 1",
     "base_model": {"s1": -0.49, "s2": 1.0, "unfinished": 0, "score": -1.49},
     "layers": [{"s1": -0.39, "s2": 0.77, "unfinished": 1, "layer": 0, "score": -1.16}, …]}

`score` is s1 − s2, for other readers. Later versions may add keys, which are read over; a change of
meaning raises `version`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator
from rich.console import Console

from lunar_tune.data.records import Record
from lunar_tune.data.splits import sample_by_edge
from lunar_tune.display import tracked
from lunar_tune.errors import InputError
from lunar_tune.files import read_settings
from lunar_tune.models.layout import check_layers
from lunar_tune.yaml_files import describe_mistakes

if TYPE_CHECKING:
    from torch import Tensor

    from lunar_tune.metrics.embedding import Embedder
    from lunar_tune.trial.worker import Worker

DEFAULT_ROWS = 20  # an edge of PISTOL, an author of TOFU
# A layer is recommended if it gains this share of what the best one gains over the base model.
# A share, since similarities stretch differently with every model and embedding.
RECOMMENDED_SHARE = 0.8
Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
_FORM = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class Similarities(BaseModel):
    """How answers to the questions to forget look."""

    model_config = _FORM

    s1: float  # mean similarity to the refusals; see `Refusals.quality`
    s2: float  # mean similarity to the true answers; see `Embedder.truth_similarity`
    unfinished: Index
    """Answers that spent their token budget. A vector that is added too strongly makes a model
    repeat itself, which is like neither refusal nor truth, and which the score does not punish."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def score(self) -> float:
        """s1 − s2; higher is better."""
        return self.s1 - self.s2


class LayerSimilarities(Similarities):
    """How they look with c·r_l added after one block."""

    layer: Index


class LayerPrior(BaseModel):
    """The curve over the layers, what it recommends, and how it came about."""

    model_config = _FORM

    format: Literal["lunar-tune layer prior"] = "lunar-tune layer prior"
    version: Literal[1] = 1
    model: str  # its name, as in a search's results
    n_layers: Count  # decoder blocks of the model
    best: Index  # the layer with the highest score
    recommended: Annotated[tuple[Index, ...], Field(min_length=1)]  # those near it, ascending
    data: str
    forget_edges: tuple[str, ...]
    rows: Count  # questions that were asked
    coefficient: float
    max_new_tokens: Count
    seed: int
    embedding: str  # what similarities were taken in; they compare with those of the same only
    base_model: Similarities  # without anything added
    layers: Annotated[tuple[LayerSimilarities, ...], Field(min_length=1)]  # some or all, ascending

    @model_validator(mode="after")
    def _layers_agree(self) -> Self:
        scored = [one.layer for one in self.layers]
        if scored != sorted(set(scored)) or scored[-1] >= self.n_layers:
            raise ValueError(
                f"layers: ascending numbers from 0 to {self.n_layers - 1} are needed, each once"
            )
        strangers = sorted({self.best, *self.recommended} - set(scored))
        if strangers:
            raise ValueError(f"best, recommended: layer {strangers[0]} is not among layers")
        return self

    def document(self) -> str:
        """Return the file's content."""
        return self.model_dump_json(indent=1) + "\n"

    def check_fits(self, *, model: str, n_layers: int | None, source: str) -> None:
        """Refuse the layers of another model, by name and depth if known, which `source` names."""
        if self.model == model and n_layers in (None, self.n_layers):
            return
        blocks = "" if n_layers is None else f" with {n_layers} decoder blocks"
        raise InputError(
            f"{source}: was made for model {self.model!r} with {self.n_layers} decoder blocks, "
            f"and the model is {model!r}{blocks}. Make a file with: python -m lunar_tune.layers "
            f"--model {model} --json FILE"
        )


def read_layer_prior(path: Path) -> LayerPrior:
    """Read a file that `python -m lunar_tune.layers --json` wrote."""
    try:
        return LayerPrior.model_validate_json(read_settings(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        raise InputError(
            f"{path}: is not a layer prior of python -m lunar_tune.layers --json: "
            f"{describe_mistakes(error)}."
        ) from error


def recommended_layers(base: float, scores: Mapping[int, float]) -> tuple[int, tuple[int, ...]]:
    """Return the best layer, on a tie the lowest, and those near it; itself if it gains nothing."""
    best = max(scores, key=lambda layer: (scores[layer], -layer))
    gain = scores[best] - base
    if gain <= 0:
        return best, (best,)
    least = base + RECOMMENDED_SHARE * gain
    return best, tuple(layer for layer in scores if scores[layer] >= least or layer == best)


def layer_scores(
    worker: Worker,
    *,
    coefficient: float,
    layers: Sequence[int] | None = None,
    rows: int = DEFAULT_ROWS,
    embedder: Embedder | None = None,
    console: Console | None = None,
) -> tuple[LayerPrior, dict[int | None, tuple[str, ...]]]:
    """Ask the questions to forget with c·r_l added after each block in turn, and score the answers.

    No weight is changed. The curve comes with the answers by layer; None is the base model's. The
    worker's method is LUNAR; no layers are all, no embedder is the model's own states.
    """
    from lunar_tune.engine.decoding import token_budget
    from lunar_tune.metrics.embedding import Refusals, StateEmbedder

    loaded, spec = worker.loaded, worker.spec
    chosen = tuple(sorted(range(loaded.n_layers) if layers is None else layers))
    check_layers(chosen, loaded.n_layers, option="--range layer")
    records = sample_by_edge(spec.data.forget, rows, seed=spec.seed)
    truths = [record.answer for record in records]
    budget = token_budget(spec.max_new_tokens, worker.encoder.texts(truths))
    embedder = embedder or StateEmbedder(worker.encoder, centre=(*spec.data.refusals, *truths))
    refusals = Refusals(embedder, spec.data.refusals)
    vectors = worker.prepared.vectors  # type: ignore[attr-defined] # the method is LUNAR
    shifts = {layer: coefficient * vectors[layer] for layer in chosen}
    seen: dict[Any, dict[str, Any]] = {}
    answers: dict[int | None, tuple[str, ...]] = {}
    what, total = "asking, layer by layer", 1 + len(chosen)
    answered = _answered(worker, records, shifts, budget)
    for layer, tokens in tracked(answered, what, total=total, console=console):
        texts = tuple(loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        answers[layer] = texts
        seen[layer] = {
            "s1": refusals.quality(texts),
            "s2": embedder.truth_similarity(texts, truths),
            "unfinished": sum(len(answer) == budget for answer in tokens),
        }
    base = Similarities(**seen.pop(None))
    scored = tuple(LayerSimilarities(layer=layer, **one) for layer, one in seen.items())
    best, recommended = recommended_layers(base.score, {one.layer: one.score for one in scored})
    prior = LayerPrior(
        model=spec.model.name,
        n_layers=loaded.n_layers,
        best=best,
        recommended=recommended,
        data=spec.data.name,
        forget_edges=spec.data.forget_edges,
        rows=len(records),
        coefficient=float(coefficient),
        max_new_tokens=budget,
        seed=spec.seed,
        embedding=embedder.name,
        base_model=base,
        layers=scored,
    )
    return prior, answers


def _answered(
    worker: Worker, records: Sequence[Record], shifts: Mapping[int, Tensor], budget: int
) -> Iterator[tuple[int | None, list[list[int]]]]:
    """Yield the base model's answers, and with each shift; it is the base model in between."""
    from lunar_tune.engine.decoding import generate_tokens
    from lunar_tune.methods.lunar.method import steered

    loaded = worker.loaded
    prompts = worker.encoder.prompts([record.question for record in records])
    yield None, generate_tokens(loaded, prompts, max_new_tokens=budget)
    for layer, shift in shifts.items():
        with steered(loaded, layer, shift):
            tokens = generate_tokens(loaded, prompts, max_new_tokens=budget)
        yield layer, tokens
