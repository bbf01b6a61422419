"""Scored layers as a file, which a search takes as a prior for its layer.

    {"format": "lunar-tune layer prior", "version": 1,
     "model": "tiny", "n_layers": 4, "best": 3, "recommended": [3],
     "data": "mini", "forget_edges": ["A_B"], "rows": 12, "coefficient": 0.5,
     "max_new_tokens": 32, "seed": 0, "embedding": "own states after block 1",
     "unmodified": {"s1": -0.49, "s2": 1.0, "unfinished": 0, "score": -1.49},
     "layers": [{"s1": -0.39, "s2": 0.77, "unfinished": 1, "layer": 0, "score": -1.16}, …]}

`score` is s1 − s2, for other readers. `layer_scores` may be some of the model's blocks only. Later
versions may add keys, which are read over; a change of meaning raises `version`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from lunar_tune.errors import InputError
from lunar_tune.trial.layer_scores import Answers, LayerScores
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.yaml_files import describe_mistakes

__all__ = ["LayerPrior", "Similarities", "read_layer_prior"]

Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
_FORM = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class Similarities(BaseModel):
    """How the answers look."""

    model_config = _FORM

    s1: float
    """Mean similarity to the refusals."""
    s2: float
    """Mean similarity to the true answers."""
    unfinished: Index
    """Answers that spent their token budget."""

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
    model: str
    """Its name, as in a search's results."""
    n_layers: Count
    """Decoder blocks of the model."""
    best: Index
    """The layer with the highest score."""
    recommended: Annotated[tuple[Index, ...], Field(min_length=1)]
    """The layers that come near it, ascending."""
    data: str
    forget_edges: tuple[str, ...]
    rows: Count
    """Questions that were asked."""
    coefficient: float
    max_new_tokens: Count
    seed: int
    embedding: str
    """What similarities were taken in; they compare with those of the same embedding only."""
    unmodified: Similarities
    """Without anything added."""
    layers: Annotated[tuple[LayerSimilarities, ...], Field(min_length=1)]
    """Ascending."""

    @model_validator(mode="after")
    def _layers_agree(self) -> Self:
        scored = [one.layer for one in self.layers]
        if scored != sorted(set(scored)) or scored[-1] >= self.n_layers:
            raise ValueError(
                f"layers: ascending numbers from 0 to {self.n_layers - 1} are needed, each once"
            )
        strangers = sorted({self.best, *self.recommended} - set(scored))
        if strangers:
            raise ValueError(f"best, recommended: layer {strangers[0]} stands not among layers")
        return self

    @classmethod
    def of(cls, scores: LayerScores, spec: TrialSpec, *, n_layers: int) -> LayerPrior:
        """Return what is to be kept of scored layers; no answer is among it.

        Args:
            scores: The curve.
            spec: Of the worker that it came from.
            n_layers: Decoder blocks of its model.
        """
        return cls(
            model=spec.model.name,
            n_layers=n_layers,
            best=scores.best,
            recommended=scores.recommended,
            data=spec.data.name,
            forget_edges=spec.data.forget_edges,
            rows=len(scores.records),
            coefficient=float(scores.coefficient),
            max_new_tokens=scores.max_new_tokens,
            seed=spec.seed,
            embedding=scores.embedding,
            unmodified=Similarities(**_similarities(scores.unmodified)),
            layers=tuple(
                LayerSimilarities(layer=one.layer, **_similarities(one.answers))
                for one in scores.layers
            ),
        )

    def document(self) -> str:
        """Return the file's content."""
        return self.model_dump_json(indent=1) + "\n"

    def check_fits(self, *, model: str, n_layers: int | None, source: str) -> None:
        """Check that the layers are those of a model.

        Args:
            model: The model's name.
            n_layers: Its decoder blocks; None where they are not known yet.
            source: Where this came from, for the message, for example `--layer-prior FILE`.

        Raises:
            InputError: They are another model's.
        """
        same_depth = n_layers is None or n_layers == self.n_layers
        if self.model == model and same_depth:
            return
        blocks = "" if n_layers is None else f" with {n_layers} decoder blocks"
        raise InputError(
            f"{source}: was made for model {self.model!r} with {self.n_layers} decoder blocks, "
            f"and this is {model!r}{blocks}. Make one with: python -m lunar_tune.layers --model "
            f"{model} --json FILE"
        )


def read_layer_prior(path: Path) -> LayerPrior:
    """Read a file that `python -m lunar_tune.layers --json` wrote.

    Raises:
        InputError: It cannot be read, or is no such file; the message says all that is wrong.
    """
    try:
        return LayerPrior.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        what = "; ".join(describe_mistakes(error, ()))
        raise InputError(
            f"{path}: is no layer prior of python -m lunar_tune.layers --json: {what}."
        ) from error


def _similarities(answers: Answers) -> dict[str, Any]:
    return {"s1": answers.s1, "s2": answers.s2, "unfinished": answers.unfinished}
