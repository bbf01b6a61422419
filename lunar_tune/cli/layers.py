"""The command `lunar-tune layers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lunar_tune.cli.commands import Command, CommonOptions, Given, Reused
from lunar_tune.cli.running import say
from lunar_tune.config.fields import check_values, same_option, shared_options
from lunar_tune.config.run_options import ModelOptions, RunOptions, read_assignments, read_range
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import InputError, Problems
from lunar_tune.paths import check_writable_file
from lunar_tune.report.progress_bars import build_progress

if TYPE_CHECKING:
    from lunar_tune.trial.layer_prior import LayerPrior
    from lunar_tune.trial.layer_scores import LayerScores
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
        Reused, "save", help="Draw the curve, as .png or .svg.", metavar="FILE"
    )


def layers(options: LayersOptions, _: Given) -> None:
    """Choose layers as LUNAR's paper does, without training.

    After each block in turn the unlearning vector is added while the questions to forget are
    answered. A good layer's answers are like refusals (s1) and unlike the truth (s2). What an edit
    there does to retained questions is not looked at: search the recommended layers.

    `lunar-tune layers --model tiny --save layers.png`
    """
    console = Console(quiet=options.quiet, emoji=False)
    problems = Problems()
    # Nothing is fitted and nothing is scored by ROUGE: all else is left at its default.
    run = shared_options(options, RunOptions, without={"evaluation_rows", "fix"})
    for flag, file in (("--json", options.json), ("--save", options.save)):
        with problems.collect():
            _check_file(flag, file)
    coefficient, rows = 2.0, options.evaluation_rows or 1
    check_values(options, problems)
    with problems.collect():
        coefficient = _coefficient(options.fix)
    spec, chosen = _checked(run, options.range, coefficient, problems)
    scores, prior = _score(spec, chosen, console, coefficient=coefficient, rows=rows)
    _show(scores, console, text=options.text)
    _write(prior, options.json, options.save, console)


def _checked(
    options: RunOptions,
    ranges: Sequence[str],
    coefficient: float,
    problems: Problems,
) -> tuple[TrialSpec, tuple[int, ...] | None]:
    """Return the spec and the layers, or say everything that is wrong."""
    from lunar_tune.models.layout import check_layers
    from lunar_tune.trial.assemble import assemble, known_depth
    from lunar_tune.trial.layer_scores import check_coefficient, check_has_layers

    spec = chosen = None
    with problems.collect():
        spec = assemble(options)
    if spec is not None:
        with problems.collect():
            check_has_layers(spec.method)
    with problems.collect():
        check_coefficient(coefficient)
    if ranges:
        with problems.collect():
            chosen = _layers(ranges)
            if (depth := known_depth(options)) is not None:
                check_layers(chosen, depth, option="--range layer")
    problems.raise_if_any()
    if spec is None:
        raise AssertionError("a spec that is None comes with a noted problem")
    return spec, chosen


def _score(
    spec: TrialSpec,
    chosen: Sequence[int] | None,
    console: Console,
    *,
    coefficient: float,
    rows: int,
) -> tuple[LayerScores, LayerPrior]:
    from lunar_tune.metrics.embedding import load_sentence_embedder
    from lunar_tune.trial.assemble import materialise
    from lunar_tune.trial.layer_prior import LayerPrior
    from lunar_tune.trial.layer_scores import layer_scores
    from lunar_tune.trial.worker import Worker

    embedder = None
    if spec.embedding_model is not None:  # before the large model is loaded
        embedder = load_sentence_embedder(spec.embedding_model, device=spec.model.device)
    with build_progress(console) as bar:
        building = bar.add_task("building the tiny model (once)", visible=False, note="")
        ready = materialise(
            spec,
            lambda done, total: bar.update(building, completed=done, total=total, visible=True),
        )
        asking = bar.add_task("asking, layer by layer", total=None, note="")
        worker = Worker(dataclasses.replace(ready, metrics=()))  # it judges no trial
        scores = layer_scores(
            worker,
            coefficient=coefficient,
            layers=chosen,
            rows=rows,
            embedder=embedder,
            on_layer=lambda done, total: bar.update(asking, completed=done, total=total),
        )
    return scores, LayerPrior.of(scores, spec, n_layers=worker.loaded.n_layers)


def _show(scores: LayerScores, console: Console, *, text: bool) -> None:
    """Print the table, with an answer each if it may be shown, and the recommendation."""
    from lunar_tune.trial.layer_scores import RECOMMENDED_SHARE

    table = Table(box=None, pad_edge=False, header_style="bold")
    last = ("an answer",) if text else ()
    for column in ("layer", "s1", "s2", "s1-s2", "unfinished", "", *last):
        numeric = column not in ("", "an answer")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    width = min(_ANSWER_WIDTH, max(_LEAST_ANSWER, console.width - _OTHER_COLUMNS))
    recommended = scores.recommended
    for name, answers in (
        ("none", scores.unmodified),
        *((one.layer, one.answers) for one in scores.layers),
    ):
        mark = "best" if name == scores.best else "recommended" if name in recommended else ""
        numbers = (f"{value:.3f}" for value in (answers.s1, answers.s2, answers.score))
        unfinished = f"{answers.unfinished}/{len(answers.texts)}"
        example = escape(" ".join(answers.texts[0].split())[:width])
        table.add_row(str(name), *numbers, unfinished, mark, *((example,) if text else ()))
    console.print(
        f"Similarity of {len(scores.records)} answers to refusals (s1) and to the true answers "
        f"(s2), coefficient {scores.coefficient:g}, in: {scores.embedding}",
        highlight=False,
        markup=False,
    )
    console.print(table)
    console.print(
        f"recommended: {_shown(recommended)} (at least {RECOMMENDED_SHARE:.0%} of the best "
        f"layer's gain over the base model); in a search space: {_as_space(recommended)}",
        highlight=False,
        markup=False,
    )
    best = next(one.answers for one in scores.layers if one.layer == scores.best)
    if best.score <= scores.unmodified.score:
        console.print("No layer moves the answers: try a larger --fix coefficient.", style="yellow")
    elif best.unfinished * 2 > len(best.texts):
        console.print(
            "Most answers at the best layer do not end: the vector is added too strongly for the "
            "curve to tell layers apart; try a smaller --fix coefficient.",
            style="yellow",
        )


def _write(prior: LayerPrior, json_file: Path | None, plot: Path | None, console: Console) -> None:
    from lunar_tune.files import write_atomically

    if json_file is not None:
        write_atomically(json_file, prior.document().encode())
    if plot is not None:
        _draw(prior, plot)
    for what, where in (("scores", json_file), ("picture", plot)):
        if where is not None:
            say(console, f"{what} written to {where}")


def _draw(prior: LayerPrior, plot: Path) -> None:
    from lunar_tune.report.charts import layer_curve
    from lunar_tune.report.marks import save_chart
    from lunar_tune.report.report import LayerCurve

    edges = ", ".join(prior.forget_edges)
    title = f"{prior.model}, {prior.data}: forget {edges}, coefficient {prior.coefficient:g}"
    save_chart(layer_curve(LayerCurve.read(prior.model_dump()), title=title), plot)


def _check_file(flag: str, file: Path | None) -> None:
    """Refuse a file that cannot be written."""
    check_writable_file(file, flag)
    if file is None or flag != "--save":
        return
    from lunar_tune.report.marks import PICTURE_SUFFIXES  # loads Altair

    if file.suffix.lower() not in PICTURE_SUFFIXES:
        raise InputError(f"{flag} {file}: a name that ends in {' or '.join(PICTURE_SUFFIXES)}.")


def _coefficient(fix: tuple[str, ...]) -> float:
    """Return the coefficient that is fixed.

    Raises:
        InputError: Something else is fixed, or it is no number.
    """
    fixed = read_assignments(fix)
    value = fixed.pop("coefficient", 2.0)
    if fixed or isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"--fix {', '.join(fix)}: coefficient=NUMBER is all that is fixed here.")
    return float(value)


def _layers(ranges: Sequence[str]) -> tuple[int, ...]:
    """Return the blocks of a range.

    Raises:
        InputError: It is none.
    """
    name, low, high = read_range(ranges[0])
    if len(ranges) > 1 or name != "layer" or not (low.is_integer() and high.is_integer()):
        raise InputError(f"--range {', '.join(ranges)}: layer=LOW:HIGH, in whole numbers.")
    return tuple(range(int(low), int(high) + 1))


def _shown(chosen: Sequence[int]) -> str:
    """Return ascending layers as `0-3,5`."""
    runs: list[list[int]] = []
    for layer in chosen:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _as_space(chosen: Sequence[int]) -> str:
    """Return layers as a search space's line."""
    if len(chosen) == 1:
        return f"layer: {{type: fixed, value: {chosen[0]}}}"
    if len(chosen) == chosen[-1] - chosen[0] + 1:
        return f"layer: {{type: int, low: {chosen[0]}, high: {chosen[-1]}}}"
    return f"layer: {{type: choice, values: {list(chosen)}}}"


COMMAND = Command(layers, LayersOptions)
