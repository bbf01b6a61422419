"""The command `python -m lunar_tune.layers`: which layers to search, without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lunar_tune.cli.layer_lists import read_layers, show_layers
from lunar_tune.cli.options.given import GivenOptions, merge_options, with_run_options
from lunar_tune.cli.running import DebugOption, QuietOption, reporting_errors, say
from lunar_tune.config.decoding_settings import DecodingSettings
from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import InputError, Problems
from lunar_tune.paths import check_writable_file
from lunar_tune.report.progress_bars import build_progress

if TYPE_CHECKING:
    from lunar_tune.trial.layer_prior import LayerPrior
    from lunar_tune.trial.layer_scores import LayerScores
    from lunar_tune.trial.spec import TrialSpec

_LAYERS = "Layers and results"
# Fields of the run that have no part in this: nothing is fitted, only questions to forget are
# asked, and nothing is scored by ROUGE.
_UNUSED = (
    *("lunar", "gradient", "engine.early_exit", "engine.reuse", "retain_data", "factual_data"),
    *("retain_rows", "rouge_tokenizer", "metrics"),
)
_ANSWER_WIDTH, _LEAST_ANSWER, _OTHER_COLUMNS = 60, 12, 60


@with_run_options
def layers(
    *,
    ctx: typer.Context,  # noqa: ARG001 taken by the decorator
    given: GivenOptions,
    coefficient: Annotated[
        float,
        typer.Option(help="How far to move along each unlearning vector.", rich_help_panel=_LAYERS),
    ] = 2.0,
    layer_range: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="Decoder blocks, for example 0-3 or 8-20,24. Default: all.",
            metavar="L[-L][,…]",
            rich_help_panel=_LAYERS,
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(help="Questions to forget that are asked, by edge.", rich_help_panel=_LAYERS),
    ] = 20,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write the scores, for a search's prior.", rich_help_panel=_LAYERS
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the curve, as .png or .svg.", rich_help_panel=_LAYERS),
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Choose layers as LUNAR's paper does, without training.

    After each block in turn the unlearning vector is added while the questions to forget are
    answered. A good layer's answers are like refusals (s1) and unlike the truth (s2). What an edit
    there does to retained questions is not looked at: search the recommended layers.

    `python -m lunar_tune.layers --model tiny --coefficient 2 --plot layers.png`
    """
    with reporting_errors(debug=debug):
        console = Console(quiet=quiet, emoji=False)
        problems = Problems()
        # A refusal is short: the budget follows the true answers, as in a search.
        base = RunOptions(decoding=DecodingSettings(max_new_tokens=None))
        options = merge_options(base, given, problems)
        for flag, file in (("--json", json_file), ("--plot", plot)):
            with problems.collect():
                _check_file(flag, file)
        spec, chosen = _checked(options, layer_range, coefficient, rows, problems)
        if unused := _unused(given):
            console.print(f"not used here: {', '.join(unused)}", style="dim", highlight=False)
        scores, prior = _score(spec, chosen, console, coefficient=coefficient, rows=rows)
        _show(scores, console, text=options.text)
        _write(prior, json_file, plot, console)


def _checked(
    options: RunOptions,
    layer_range: str | None,
    coefficient: float,
    rows: int,
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
    if rows < 1:
        problems.add(f"--rows {rows}: at least 1.")
    if layer_range is not None:
        with problems.collect():
            chosen = read_layers(layer_range, "--layers")
            if (depth := known_depth(options)) is not None:
                check_layers(chosen, depth, option="--layers")
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
        f"recommended: {show_layers(recommended)} (at least {RECOMMENDED_SHARE:.0%} of the best "
        f"layer's gain over the unmodified model); in a search space: {_as_space(recommended)}",
        highlight=False,
        markup=False,
    )
    best = next(one.answers for one in scores.layers if one.layer == scores.best)
    if best.score <= scores.unmodified.score:
        console.print("No layer moves the answers: try a larger --coefficient.", style="yellow")
    elif best.unfinished * 2 > len(best.texts):
        console.print(
            "Most answers at the best layer do not end: the vector is added too strongly for the "
            "curve to tell layers apart; try a smaller --coefficient.",
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
    from lunar_tune.report.layer_curve import LayerCurve
    from lunar_tune.report.pictures.layers_figure import draw_layers

    edges = ", ".join(prior.forget_edges)
    draw_layers(
        LayerCurve.read(prior.model_dump()),
        plot,
        title=f"{prior.model}, {prior.data}: forget {edges}, coefficient {prior.coefficient:g}",
    )


def _check_file(flag: str, file: Path | None) -> None:
    """Refuse a file that cannot be written."""
    check_writable_file(file, flag)
    if file is None or flag != "--plot":
        return
    from lunar_tune.report.pictures.figure import PICTURE_SUFFIXES  # loads matplotlib

    if file.suffix.lower() not in PICTURE_SUFFIXES:
        raise InputError(f"{flag} {file}: a name that ends in {' or '.join(PICTURE_SUFFIXES)}.")


def _unused(given: GivenOptions) -> list[str]:
    """Return the options that were given and have no part in this."""
    return [
        option.flag.partition("/")[0]
        for option in given.values
        if any(option.path == path or option.path.startswith(f"{path}.") for path in _UNUSED)
    ]


def _as_space(chosen: Sequence[int]) -> str:
    """Return layers as a search space's line."""
    if len(chosen) == 1:
        return f"layer: {{type: fixed, value: {chosen[0]}}}"
    if len(chosen) == chosen[-1] - chosen[0] + 1:
        return f"layer: {{type: int, low: {chosen[0]}, high: {chosen[-1]}}}"
    return f"layer: {{type: choice, values: {list(chosen)}}}"
