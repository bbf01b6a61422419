"""The command `lunar-tune layers`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.cli.commands import Command, CommonOptions, plain_table
from lunar_tune.config.fields import same_option, shared_options
from lunar_tune.config.options import (
    ModelOptions,
    Reused,
    RunOptions,
    SearchConfig,
    read_assignments,
    read_range,
)
from lunar_tune.display import say, warn
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import write_atomically

if TYPE_CHECKING:
    from lunar_tune.trial.layer_scores import LayerPrior
    from lunar_tune.trial.spec import TrialSpec

_TOO_MANY = 1000  # decoder blocks; more than any model has
_ANSWER_WIDTH, _LEAST_ANSWER, _OTHER_COLUMNS = 60, 12, 60


@dataclass(frozen=True, kw_only=True)
class LayersOptions(ModelOptions, CommonOptions):
    """What the command takes."""

    data: str | None = same_option(RunOptions, "data")
    edge: str | None = same_option(RunOptions, "edge")
    forget_edge: tuple[str, ...] = same_option(RunOptions, "forget_edge")
    reference_prompts: str | None = same_option(RunOptions, "reference_prompts")
    reference_check: str = same_option(RunOptions, "reference_check")
    refusals: str = same_option(RunOptions, "refusals")
    holdout: bool = same_option(RunOptions, "holdout")
    text: bool = same_option(RunOptions, "text")
    evaluation_rows: int = same_option(RunOptions, "evaluation_rows", default=20, common=True)
    """How many questions to forget are asked, drawn by edge."""
    fix: tuple[str, ...] = same_option(
        RunOptions, "fix", default=("coefficient=2",), metavar="coefficient=C"
    )
    """How far to move along each unlearning vector."""
    range: tuple[str, ...] = same_option(SearchConfig, "range", metavar="layer=LOW:HIGH")
    """Decoder blocks to score. Default: all."""
    max_new_tokens: int | None = same_option(SearchConfig, "max_new_tokens")
    embedding_model: str | None = same_option(RunOptions, "embedding_model")
    seed: int = same_option(RunOptions, "seed")
    memory_budget: float | None = same_option(RunOptions, "memory_budget")
    cache_limit: float | None = same_option(RunOptions, "cache_limit")
    json: Path | None = same_option(Reused, "json")
    """Write the scores, for --layer-prior of a search."""
    save: Path | None = same_option(Reused, "save", metavar="FILE", written=True)
    """Draw the curve, as .png or .svg."""


@Command
def layers(options: LayersOptions, problems: Problems) -> None:
    """Choose layers as LUNAR's paper does, without training.

    After each block in turn the unlearning vector is added while the questions to forget are
    answered. A good layer's answers are like refusals (s1) and unlike the truth (s2). What an edit
    there does to retained questions is not measured: search the recommended layers.

    `lunar-tune layers --model tiny --save layers.png`
    """
    console, embedder = options.console, None
    with options.working("reading data") as doing:
        spec, coefficient, chosen = _checked(options, problems)
        for note in spec.data.notes:
            say(console, note)
        doing("loading torch")
        from lunar_tune.metrics.embedding import load_sentence_embedder
        from lunar_tune.trial.assemble import check_machine, materialise
        from lunar_tune.trial.layer_scores import layer_scores
        from lunar_tune.trial.references import judge_references
        from lunar_tune.trial.worker import Worker

        check_machine(spec)
    if spec.embedding_model is not None:  # before the large model is loaded
        embedder = load_sentence_embedder(spec.embedding_model, device=spec.model.device)
    worker = Worker(dataclasses.replace(materialise(spec, console), metrics=()))  # judges no trial
    judge_references(worker.references, spec.reference_check, console)
    prior, answers = layer_scores(
        worker,
        coefficient=coefficient,
        layers=chosen,
        rows=options.evaluation_rows,
        embedder=embedder,
        console=console,
    )
    _show(prior, answers, console, text=options.text, file=options.json)
    if options.json is not None:
        write_atomically(options.json, prior.document().encode())
        say(console, f"scores written to {options.json}")
    if options.save is not None:
        from lunar_tune.report.charts import layer_curve
        from lunar_tune.report.marks import save_chart

        edges = ", ".join(prior.forget_edges)
        title = f"{prior.model}, {prior.data}: forget {edges}, coefficient {prior.coefficient:g}"
        save_chart(layer_curve(prior.model_dump(), title=title), options.save)
        say(console, f"picture written to {options.save}")


def _checked(
    options: LayersOptions, problems: Problems
) -> tuple[TrialSpec, float, tuple[int, ...] | None]:
    """Return the spec, the coefficient and the layers, or say everything that is wrong."""
    from lunar_tune.models.layout import check_layers
    from lunar_tune.trial.assemble import answered, assemble, known_depth

    chosen = None
    # Nothing is fitted and nothing is scored by ROUGE: all else is left at its default.
    run = shared_options(options, RunOptions, without={"evaluation_rows", "fix"})
    if options.save is not None:
        from lunar_tune.report.marks import PICTURE_SUFFIXES  # loads Altair

        if options.save.suffix.lower() not in PICTURE_SUFFIXES:
            endings = " or ".join(PICTURE_SUFFIXES)
            problems.add(f"--save {options.save}: must end in {endings}.")
    with problems.collect():
        fixed, written = read_assignments(options.fix), ", ".join(options.fix)
        value = fixed.pop("coefficient", None)
        if fixed or isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"--fix {written}: only coefficient=NUMBER can be fixed here.")
        if value == 0 or not math.isfinite(value):
            raise InputError(f"--fix coefficient={value}: must be a finite number other than 0.")
        coefficient = float(value)
    with problems.collect():
        spec = assemble(run)
    if options.range:
        with problems.collect():
            name, low, high = read_range(options.range[0])
            is_whole = low.is_integer() and high.is_integer()
            can_be = is_whole and 0 <= low <= high < _TOO_MANY
            if len(options.range) > 1 or name != "layer" or not can_be:
                listed = ", ".join(options.range)
                limits = f"whole numbers from 0 to {_TOO_MANY - 1}"
                raise InputError(f"--range {listed}: must be layer=LOW:HIGH, in {limits}.")
            chosen = tuple(range(int(low), int(high) + 1))
            if (depth := known_depth(run)) is not None:
                check_layers(chosen, depth, option="--range layer")
    problems.raise_if_any()
    return answered(run, spec), coefficient, chosen


def _show(
    prior: LayerPrior,
    answers: Mapping[int | None, Sequence[str]],
    console: Console,
    *,
    text: bool,
    file: Path | None,
) -> None:
    """Print the table, with an answer each if it may be shown, and the recommendation."""
    from lunar_tune.trial.layer_scores import RECOMMENDED_SHARE

    width = min(_ANSWER_WIDTH, max(_LEAST_ANSWER, console.width - _OTHER_COLUMNS))
    rows, by_layer = [], {one.layer: one for one in prior.layers}
    for layer, seen in ((None, prior.base_model), *by_layer.items()):
        mark = "recommended" if layer in prior.recommended else ""
        similarities = (f"{value:.3f}" for value in (seen.s1, seen.s2, seen.score))
        sample = (" ".join(answers[layer][0].split())[:width],) if text else ()
        unfinished = f"{seen.unfinished}/{prior.rows}"
        mark = "best" if layer == prior.best else mark
        rows.append(("none" if layer is None else layer, *similarities, unfinished, mark, *sample))
    columns = ("layer", "s1", "s2", "s1-s2", "unfinished", "", *(("an answer",) if text else ()))
    say(
        console,
        f"Similarity of {prior.rows} answers to refusals (s1) and to the true answers "
        f"(s2), coefficient {prior.coefficient:g}, in: {prior.embedding}",
    )
    console.print(plain_table(columns, rows, left=("", "an answer")))
    say(
        console,
        f"recommended: {', '.join(map(str, prior.recommended))} (at least {RECOMMENDED_SHARE:.0%} "
        "of the best layer's gain over the base model); to search them, "
        f"{'' if file is not None else 'write the scores with --json FILE and '}"
        f"give {file or 'the file'} to a search with --layer-prior",
    )
    best = by_layer[prior.best]
    if best.score <= prior.base_model.score:
        warn(console, "no layer moves the answers: try a larger --fix coefficient.")
    elif best.unfinished * 2 > prior.rows:
        warn(
            console,
            "most answers at the best layer do not end: the vector is added too strongly for the "
            "curve to tell layers apart; try a smaller --fix coefficient.",
        )
