"""The command `lunar-tune layers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lunar_tune.cli.commands import Command, CommonOptions, Reused
from lunar_tune.cli.running import plain_table, say, warn
from lunar_tune.config.fields import same_option, shared_options
from lunar_tune.config.run_options import ModelOptions, RunOptions, read_assignments, read_range
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import write_atomically
from lunar_tune.report.progress_bars import build_progress, epochs_shown

if TYPE_CHECKING:
    from lunar_tune.trial.layer_scores import LayerPrior
    from lunar_tune.trial.spec import TrialSpec

_ANSWER_WIDTH, _LEAST_ANSWER, _OTHER_COLUMNS = 60, 12, 60


@dataclass(frozen=True, kw_only=True)
class LayersOptions(ModelOptions, CommonOptions):
    """What the command takes."""

    data: str | None = same_option(RunOptions, "data")
    forget_edge: tuple[str, ...] = same_option(RunOptions, "forget_edge")
    reference_prompts: str = same_option(RunOptions, "reference_prompts")
    refusals: str = same_option(RunOptions, "refusals")
    holdout: bool = same_option(RunOptions, "holdout")
    text: bool = same_option(RunOptions, "text")
    evaluation_rows: int | None = same_option(
        RunOptions,
        "evaluation_rows",
        default=20,
        help="Questions to forget that are asked, by edge.",
        common=True,
    )
    fix: tuple[str, ...] = same_option(
        RunOptions,
        "fix",
        default=("coefficient=2",),
        help="How far to move along each unlearning vector.",
        metavar="coefficient=C",
    )
    range: tuple[str, ...] = same_option(
        SearchConfig,
        "range",
        help="Decoder blocks to score. Default: all.",
        metavar="layer=LOW:HIGH",
    )
    max_new_tokens: int | None = same_option(SearchConfig, "max_new_tokens")
    embedding_model: str | None = same_option(RunOptions, "embedding_model")
    seed: int = same_option(RunOptions, "seed")
    memory_budget: float | None = same_option(RunOptions, "memory_budget")
    cache_limit: float | None = same_option(RunOptions, "cache_limit")
    json: Path | None = same_option(Reused, "json", help="Write the scores, for a search's prior.")
    save: Path | None = same_option(
        Reused, "save", help="Draw the curve, as .png or .svg.", metavar="FILE", written=True
    )


def layers(options: LayersOptions, problems: Problems) -> None:
    """Choose layers as LUNAR's paper does, without training.

    After each block in turn the unlearning vector is added while the questions to forget are
    answered. A good layer's answers are like refusals (s1) and unlike the truth (s2). What an edit
    there does to retained questions is not looked at: search the recommended layers.

    `lunar-tune layers --model tiny --save layers.png`
    """
    from lunar_tune.metrics.embedding import load_sentence_embedder
    from lunar_tune.trial.assemble import materialise
    from lunar_tune.trial.layer_scores import layer_scores
    from lunar_tune.trial.worker import Worker

    console, embedder = options.console(), None
    spec, coefficient, chosen = _checked(options, problems)
    if spec.embedding_model is not None:  # before the large model is loaded
        embedder = load_sentence_embedder(spec.embedding_model, device=spec.model.device)
    with build_progress(console) as bar:
        ready = materialise(spec, epochs_shown(bar, "building the tiny model (once)"))
        asking = bar.add_task("asking, layer by layer", total=None, note="")
        worker = Worker(dataclasses.replace(ready, metrics=()))  # it judges no trial
        prior, answers = layer_scores(
            worker,
            coefficient=coefficient,
            layers=chosen,
            rows=options.evaluation_rows or 1,
            embedder=embedder,
            on_layer=lambda done, total: bar.update(asking, completed=done, total=total),
        )
    _show(prior, answers, console, text=options.text)
    if options.json is not None:
        write_atomically(options.json, prior.document().encode())
        say(console, f"scores written to {options.json}")
    if options.save is not None:
        _draw(prior, options.save)
        say(console, f"picture written to {options.save}")


def _checked(
    options: LayersOptions, problems: Problems
) -> tuple[TrialSpec, float, tuple[int, ...] | None]:
    """Return the spec, the coefficient and the layers, or say everything that is wrong."""
    from lunar_tune.models.layout import check_layers
    from lunar_tune.trial.assemble import assemble, known_depth
    from lunar_tune.trial.layer_scores import check_coefficient, check_has_layers

    chosen = None
    # Nothing is fitted and nothing is scored by ROUGE: all else is left at its default.
    run = shared_options(options, RunOptions, without={"evaluation_rows", "fix"})
    with problems.collect():
        _check_picture(options.save)
    with problems.collect():
        coefficient = _coefficient(options.fix)
        check_coefficient(coefficient)
    with problems.collect():
        spec = assemble(run)
        check_has_layers(spec.method)
    if options.range:
        with problems.collect():
            chosen = _layers(options.range)
            if (depth := known_depth(run)) is not None:
                check_layers(chosen, depth, option="--range layer")
    problems.raise_if_any()
    return spec, coefficient, chosen


def _check_picture(file: Path | None) -> None:
    if file is None:
        return
    from lunar_tune.report.marks import PICTURE_SUFFIXES  # loads Altair

    if file.suffix.lower() not in PICTURE_SUFFIXES:
        raise InputError(f"--save {file}: a name that ends in {' or '.join(PICTURE_SUFFIXES)}.")


def _coefficient(fix: tuple[str, ...]) -> float:
    """Return the coefficient that is fixed, which is all that may be."""
    fixed = read_assignments(fix)
    value = fixed.pop("coefficient", None)
    if fixed or isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"--fix {', '.join(fix)}: coefficient=NUMBER is all that is fixed here.")
    return float(value)


def _layers(ranges: tuple[str, ...]) -> tuple[int, ...]:
    """Return the blocks of a range."""
    name, low, high = read_range(ranges[0])
    if len(ranges) > 1 or name != "layer" or not (low.is_integer() and high.is_integer()):
        raise InputError(f"--range {', '.join(ranges)}: layer=LOW:HIGH, in whole numbers.")
    return tuple(range(int(low), int(high) + 1))


def _show(
    prior: LayerPrior,
    answers: Mapping[int | None, Sequence[str]],
    console: Console,
    *,
    text: bool,
) -> None:
    """Print the table, with an answer each if it may be shown, and the recommendation."""
    from lunar_tune.trial.layer_scores import RECOMMENDED_SHARE

    width = min(_ANSWER_WIDTH, max(_LEAST_ANSWER, console.width - _OTHER_COLUMNS))
    rows, by_layer = [], {one.layer: one for one in prior.layers}
    for layer, seen in ((None, prior.base_model), *by_layer.items()):
        mark = "recommended" if layer in prior.recommended else ""
        rows.append(
            (
                "none" if layer is None else layer,
                *(f"{value:.3f}" for value in (seen.s1, seen.s2, seen.score)),
                f"{seen.unfinished}/{prior.rows}",
                "best" if layer == prior.best else mark,
                *((" ".join(answers[layer][0].split())[:width],) if text else ()),
            )
        )
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
        "of the best layer's gain over the base model); a search takes them with --layer-prior and "
        "the file of --json",
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


def _draw(prior: LayerPrior, plot: Path) -> None:
    from lunar_tune.report.charts import layer_curve
    from lunar_tune.report.marks import save_chart

    edges = ", ".join(prior.forget_edges)
    title = f"{prior.model}, {prior.data}: forget {edges}, coefficient {prior.coefficient:g}"
    save_chart(layer_curve(prior.model_dump(), title=title), plot)


COMMAND = Command(layers, LayersOptions)
