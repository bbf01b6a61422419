"""One unlearning run from options to scores, without Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import Problems
from lunar_tune.models.layout import check_layers
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training.adapting import check_save_folder, save_checkpoint
from lunar_tune.trial.assemble import assemble, known_depth, materialise, method_of
from lunar_tune.trial.spec import TrialSpec
from lunar_tune.trial.worker import TrialResult, Worker

__all__ = ["SingleRun", "unlearn_once"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleRun:
    """One run's outcome."""

    spec: TrialSpec
    result: TrialResult
    """The unlearned model."""
    vanilla: TrialResult | None
    """The base model, if it was asked for."""

    @property
    def scores(self) -> Mapping[str, float]:
        """The unlearned model's scores: `forget_rouge1`, `retain_rouge1` and the others."""
        return self.result.evaluation.scores

    def document(self) -> dict[str, Any]:
        """Return scores and circumstances as plain values, for JSON."""
        spec, result = self.spec, self.result
        return {
            **self.scores,
            "model": spec.model.name,
            "data": spec.data.name,
            "forget_edges": list(spec.data.forget_edges),
            "method": spec.method.name,
            "solver": spec.method.variant,
            "parameters": dict(result.parameters),
            "max_new_tokens": result.max_new_tokens,
            "embedding_model": spec.embedding_model,
            "seed": spec.seed,
            "seconds": dict(result.seconds),
            "losses": list(result.fit.losses) if result.fit is not None else [],
            "vanilla": dict(self.vanilla.evaluation.scores) if self.vanilla is not None else None,
            "answers": self._answers(),
        }

    def _answers(self) -> list[dict[str, Any]]:
        """Return the unlearned model's answers; their texts only where they may be written."""
        left_out = () if self.spec.text else ("question", "truth", "answer")
        rows = map(dataclasses.asdict, self.result.evaluation.rows)
        return [{key: one for key, one in row.items() if key not in left_out} for row in rows]


def unlearn_once(
    options: RunOptions | None = None,
    *,
    layer: int | Sequence[int] | None = None,
    coefficient: float | Sequence[float] | None = None,
    vanilla: bool = False,
    save_to: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **parameters: float,
) -> SingleRun:
    """Unlearn once and evaluate.

    Args:
        options: Model, data and method; None is the tiny model with its own data.
        layer: Decoder block to edit, or several; None for a method that has no such parameter.
        coefficient: How far to move, for each layer or one for all; None as for the layer.
        vanilla: Whether to evaluate the base model too.
        save_to: Folder for the unlearned model as a checkpoint.
        on_progress: Called with epochs done and in all while `tiny` is being built.
        **parameters: What else the method takes: `ridge` for closed_form, `learning_rate` for the
            others.

    Raises:
        InputError: Something that was asked for cannot be done.
        TrialError: The fit failed, for example by divergence.

    Example:
        >>> run = unlearn_once(layer=1, coefficient=2.0, learning_rate=3e-3)  # doctest: +SKIP
        >>> run.scores["forget_rouge1"], run.scores["retain_rouge1"]
    """
    options = options or RunOptions()
    given = {"layer": layer, "coefficient": coefficient}
    setting = {name: value for name, value in given.items() if value is not None} | parameters
    spec = _checked(options, setting, save_to)
    worker = Worker(materialise(spec, on_progress))
    full = spec.data.held_out is not None  # what is reported lies there
    before = worker.vanilla(full=full) if vanilla else None

    def save(loaded: LoadedModel) -> None:
        if save_to is not None:
            questions = [record.question for record in (*spec.data.forget, *spec.data.retain)]
            save_checkpoint(loaded, save_to, texts=questions)

    result = worker.run(setting, full=full, inside=save)
    return SingleRun(spec=worker.spec, result=result, vanilla=before)


def _checked(options: RunOptions, setting: Mapping[str, Any], save_to: Path | None) -> TrialSpec:
    """Return what runs; raise with all that is wrong with options, setting and folder."""
    problems = Problems()
    spec = None
    with problems.collect():
        spec = assemble(options)
    with problems.collect():
        method_of(options).check_parameters(setting)
    with problems.collect():
        depth, layer = known_depth(options), setting.get("layer")
        if depth is not None and layer is not None:
            layers = layer if isinstance(layer, (list, tuple)) else (layer,)
            if all(isinstance(one, int) for one in layers):  # else that is noted already
                check_layers(tuple(layers), depth)
    with problems.collect():
        if save_to is not None:
            check_save_folder(save_to)
    problems.raise_if_any()
    if spec is None:
        raise AssertionError("without a spec something is wrong")
    return spec
