"""One unlearning run from options to scores, or asked questions beside the base model; no Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lunar_tune.config.options import RunOptions
from lunar_tune.data.texts import composed, normalised
from lunar_tune.display import Summary, say, warn
from lunar_tune.errors import Problems
from lunar_tune.metrics.evaluate import answers_beside
from lunar_tune.metrics.goal import score_label
from lunar_tune.models.layout import check_layers
from lunar_tune.training.checkpoints import check_save_folder, save_checkpoint
from lunar_tune.trial.assemble import (
    answered,
    assemble,
    check_machine,
    configured,
    first_prompts,
    known_depth,
    materialise,
)
from lunar_tune.trial.references import References, judge_references
from lunar_tune.trial.spec import TrialSpec

if TYPE_CHECKING:
    import pandas as pd

    from lunar_tune.methods.contract import Edit
    from lunar_tune.models.loading import LoadedModel
    from lunar_tune.trial.worker import TrialResult


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SingleRun(Summary):
    """One run's outcome."""

    spec: TrialSpec
    result: TrialResult
    """The unlearned model."""
    baseline: TrialResult | None
    """The base model, if it was asked for."""
    references: References | None
    """What the base model does with the reference prompts; None if it was not asked."""

    @property
    def scores(self) -> Mapping[str, float]:
        """The unlearned model's scores: `forget_rouge1`, `retain_rouge1` and the others."""
        return self.result.evaluation.scores

    @property
    def answers(self) -> pd.DataFrame:
        """Each question with its true answer, the base model's if it was asked, and the new one."""
        before = self.baseline.evaluation.rows if self.baseline is not None else ()
        return answers_beside(before, self.result.evaluation.rows)

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """Return what was done, and the scores beside the base model's; see `Summary`."""
        tags = self.spec.tags
        rouge = (name for name in self.scores if name.endswith("_rouge1"))
        names = list(dict.fromkeys((*rouge, *self.spec.metrics)))[:4]
        setting = "  ".join(f"{name} {value}" for name, value in self.result.parameters.items())
        models = {"base model": self.baseline, "unlearned model": self.result}
        table = [["", *map(score_label, names)]]
        for who, result in models.items():
            known = {} if result is None else result.evaluation.scores
            table.append([who, *(f"{known[one]:.4g}" if one in known else "-" for one in names)])
        about = f"{tags['model']}, {tags['data']}: forget {tags['forget_edge']}"
        return [f"{about}, {tags['method']} ({tags['solver']})", setting], table

    def document(self) -> dict[str, Any]:
        """Return scores and circumstances as plain values; texts only where they may be written."""
        spec, result, before = self.spec, self.result, self.baseline
        left_out = () if spec.text else ("question", "truth", "answer")
        rows = map(dataclasses.asdict, result.evaluation.rows)
        found = dataclasses.asdict(self.references) if self.references is not None else None
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
            "losses": list(result.losses),
            "baseline": None if before is None else dict(before.evaluation.scores),
            "reference_prompts": found,
            "answers": [{key: row[key] for key in row if key not in left_out} for row in rows],
        }


def unlearn(
    options: RunOptions,
    setting: Mapping[str, Any] | None = None,
    *,
    baseline: bool = True,
    save_to: Path | None = None,
    console: Console | None = None,
    problems: Problems | None = None,
) -> SingleRun:
    """Unlearn once and evaluate, with a `baseline` the base model too, or raise an InputError.

    `setting` has further parameters of the method, `save_to` is the folder of a checkpoint, the
    console shows how `tiny` is built and what to know of the input. A fit that fails, for example
    by divergence, is a TrialError.
    """
    problems, setting = problems or Problems(), setting or {}
    with problems.collect():
        spec = assemble(options)
    with problems.collect():
        method, fixed = configured(options)
        given = fixed | dict(setting)
        setting = dict(method.usual) | given
        method.check_parameters(setting)
    with problems.collect():
        # Layers that the model lacks, where its depth is known without the weights.
        layers, depth = setting.get("layer"), known_depth(options)
        layers = layers if isinstance(layers, list | tuple) else [layers]
        if depth is not None and all(isinstance(one, int) for one in layers):
            check_layers(tuple(layers), depth)
    with problems.collect():
        if save_to is not None:
            check_save_folder(save_to)
    problems.raise_if_any()
    check_machine(spec)
    spec = answered(options, spec)
    if console is not None:
        for text in spec.lost_letters.values():
            warn(console, text)
        for name in method.usual.keys() - given.keys():
            say(console, f"{name} {method.usual[name]:g}, since none is given")
        for note in spec.data.notes:
            say(console, note)
    from lunar_tune.trial.worker import Worker

    spec = materialise(spec, console)
    if console is not None:
        shown = first_prompts(spec.model, spec.chat, spec.first_questions)
        for label, text in shown.items():
            say(console, f"{label}: {text}")
    worker = Worker(spec)
    judge_references(worker.references, spec.reference_check, console)
    full = spec.data.held_out is not None  # what is reported lies there
    before = worker.baseline(full=full, reported=True) if baseline else None

    def save(loaded: LoadedModel, _: Edit) -> None:
        if save_to is not None:
            questions = [record.question for record in (*spec.data.forget, *spec.data.retain)]
            save_checkpoint(loaded, save_to, texts=questions)

    result = worker.run(setting, full=full, reported=True, inside=save)
    found = worker.references
    return SingleRun(spec=worker.spec, result=result, baseline=before, references=found)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """One question and what both models say, as decoded, without special tokens."""

    question: str
    base_model: str
    unlearned: str
    truth: str | None  # the true answer; None for a question that is not in the data
    set_name: str | None  # forget, retain or factual; None as above


@contextmanager
def asking(
    spec: TrialSpec,
    parameters: Mapping[str, Any],
    *,
    epochs: int | None = None,
    max_new_tokens: int = 128,
) -> Iterator[Callable[[Sequence[str]], list[SideBySide]]]:
    """Inside, both models answer, greedily; the fit ends after `epochs`, as its trial's did."""
    from lunar_tune.engine.decoding import answer_texts
    from lunar_tune.training.answer_loss import Encoder
    from lunar_tune.trial.worker import Worker

    worker = Worker(dataclasses.replace(spec, metrics=()))
    loaded, data, held = worker.loaded, spec.data, spec.data.held_out
    encoder = Encoder(loaded, spec.chat)
    sets = {
        "factual": (*data.factual, *(held.factual if held is not None else ())),
        "retain": (*data.fit_retain, *data.retain, *(held.retain if held is not None else ())),
        "forget": (*data.fit_forget, *data.forget),
    }
    known = {
        normalised(record.question): (record.answer, name)
        for name, records in sets.items()
        for record in records
    }

    def answers(questions: Sequence[str]) -> list[str]:
        said = answer_texts(
            loaded, encoder.prompts(questions), max_new_tokens=max_new_tokens, what="questions"
        )
        return [answer for answer, _ in said]

    def ask(questions: Sequence[str]) -> list[SideBySide]:
        questions = [composed(question) for question in questions]
        with fit.base_model():
            before = answers(questions)
        return [
            SideBySide(
                question, base_model, unlearned, *known.get(normalised(question), (None, None))
            )
            for question, base_model, unlearned in zip(
                questions, before, answers(questions), strict=True
            )
        ]

    with worker.prepared.unlearning(parameters, seed=spec.seed) as fit:
        for done in fit:
            if done == epochs:
                break
        fit.finish()
        yield ask
