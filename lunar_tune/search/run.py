"""A whole search, from its configuration to its outputs and exit code.

Covers: the order of things before the first task: plan, model, folder, tracking, Ray.
Does not cover: each of these, and what comes then; the modules beside this one do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.markup import escape

from lunar_tune import __version__
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.files import write_atomically
from lunar_tune.report.progress_bars import build_progress, epochs_shown
from lunar_tune.report.results import load_search
from lunar_tune.search.backends.ray.cluster import Resources, ray_session, share_out
from lunar_tune.search.display.log_file import RECORD, search_log
from lunar_tune.search.display.summary import keep_best, print_plan, print_result
from lunar_tune.search.outputs import make_folder
from lunar_tune.search.plan import SearchPlan
from lunar_tune.search.prerequisite import Prerequisite, finetuning_fact
from lunar_tune.search.resume import alone, unfinished_like
from lunar_tune.search.session import (
    EXIT_FOUND,
    EXIT_INFEASIBLE,
    SearchSession,
    UnknowingModelError,
)
from lunar_tune.search.signature import signature_of
from lunar_tune.study.folder import Folder
from lunar_tune.tracking.store import default_tracking_uri, kept_uri
from lunar_tune.tracking.trial_runs import SearchTracker
from lunar_tune.trial.assemble import materialise

__all__ = ["run_search", "show_finished"]


def run_search(
    plan: SearchPlan,
    console: Console,
    *,
    given: Mapping[str, str],
    arguments: Sequence[str],
    brief: bool = False,
) -> int:
    """Run a planned search and return its exit code.

    Args:
        plan: From `plan_search`.
        console: Where to show what happens.
        given: Origin of options that were not left at their default.
        arguments: Options that would give the search again, for the commands that are shown.
        brief: Whether to leave out the plan and the commands that may come next.

    Raises:
        InputError: The untouched model makes success impossible, or something cannot be reached.
    """
    facts = {**plan.facts, **finetuning_fact(plan.config, plan.spec)}
    if not brief:
        print_plan(console, facts)
    signature = signature_of(plan)
    if plan.config.name is None:
        _point_out(unfinished_like(signature, plan.config.output), console)
    plan = _with_model(plan, console)
    folder = make_folder(plan.config, plan.spec)
    opening = [f"search {folder.name}, lunar-tune {__version__}"]
    opening += [f"{label.strip()}: {value}" for label, value in facts.items()]
    with (
        alone(folder),
        _given_back_if_unused(folder),
        search_log(folder.log, console, opening),
        _tracking(plan.config, folder) as opened,
        ray_session(plan.config),
    ):
        resources = share_out(plan.config)
        plan = _on_device(plan, resources)
        start = functools.partial(
            SearchSession,
            folder=folder,
            resources=resources,
            opened=opened,
            console=console,
            given=given,
            signature=signature,
            brief=brief,
        )
        code = _run_knowing(plan, start, console, arguments, opened)
        if plan.config.keep and code == EXIT_FOUND:
            keep_best(folder.path, console)
        RECORD.info("ended with exit code %d", code)
        return code


def show_finished(folder: Folder, console: Console, *, keep: bool) -> int:
    """Show what a finished search has found, and keep it if wanted; return its exit code."""
    results = load_search(folder.path)
    console.print(
        f"{escape(folder.name)} is finished: {len(results.rows)} trials. A larger --num-trials "
        "gives it more.",
        highlight=False,
        soft_wrap=True,
    )
    print_result(console, results.report, folder=folder.path, commands={})
    if results.best is None:
        return EXIT_INFEASIBLE
    if keep:
        keep_best(folder.path, console)
    return EXIT_FOUND


def _point_out(unfinished: Folder | None, console: Console) -> None:
    """Say that the same search has begun already."""
    if unfinished is not None:
        console.print(
            f"[yellow]the same search is unfinished:[/yellow] {escape(unfinished.name)} (go on "
            f"with it: python -m lunar_tune.search --resume {escape(str(unfinished.path))}); this "
            "is a new one",
            highlight=False,
            soft_wrap=True,
        )


def _run_knowing(
    plan: SearchPlan,
    start: Callable[[SearchPlan], SearchSession],
    console: Console,
    arguments: Sequence[str],
    opened: Callable[[], SearchTracker],
) -> int:
    """Run the search, after the model has learned the data if it has to and may."""
    first = None if plan.config.force else Prerequisite.of(plan)
    if first is None:
        return start(plan).run(arguments)
    if not first.is_kept:
        try:
            return start(plan).run(arguments)
        except UnknowingModelError as error:
            console.print(f"{str(error).partition(':')[0]}: it learns them first")
            first.fulfil(console, plan.config, opened())
    plan = first.applied(plan)
    weights = str(plan.spec.model.weights)
    console.print(f"the model has learned the data: {weights}", soft_wrap=True)
    try:
        return start(plan).run([*arguments, "--model-path", weights])
    except UnknowingModelError as error:
        found = str(error).partition(":")[0]
        raise UnknowingModelError(
            f"the model was fine-tuned and still does not know the data ({found}). Train it longer "
            "with python -m lunar_tune.finetune and give the result with --model-path, or remove "
            f"{weights} to train anew."
        ) from error


def _with_model(plan: SearchPlan, console: Console) -> SearchPlan:
    """Build `tiny` if it is asked for and not there yet."""
    with build_progress(console) as bar:
        spec = materialise(plan.spec, epochs_shown(bar, "building the tiny model (once)"))
    return dataclasses.replace(plan, spec=spec)


def _on_device(plan: SearchPlan, resources: Resources) -> SearchPlan:
    """Keep trials that were given no GPU off the GPUs, which Ray leaves visible to them."""
    if resources.gpus or plan.spec.model.device != "auto":
        return plan
    model = dataclasses.replace(plan.spec.model, device="cpu")
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, model=model))


@contextlib.contextmanager
def _given_back_if_unused(folder: Folder) -> Iterator[None]:
    """Remove the folder if the search ends before its first trial, so that its name is free."""
    try:
        yield
    except BaseException:
        if not folder.is_taken:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _opened(uri: str, config: SearchConfig, folder: Folder) -> SearchTracker:
    """Open the search's MLflow run, or that of an earlier process again, and keep which it is."""
    earlier = None
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(folder.run.read_text(encoding="utf-8"))
        earlier = kept["run_id"] if kept.get("uri") == kept_uri(uri) else None
    tracker = SearchTracker(
        uri,
        output=config.output,
        name=folder.name,
        experiment=config.experiment,
        earlier=earlier,
    )
    kept = {"uri": kept_uri(uri), "run_id": tracker.run_id}
    write_atomically(folder.run, json.dumps(kept).encode())
    return tracker


@contextlib.contextmanager
def _tracking(config: SearchConfig, folder: Folder) -> Iterator[Callable[[], SearchTracker]]:
    """Open the tracker while Ray starts; close its runs when something else ends the search."""
    uri = config.tracking_uri or default_tracking_uri(config.output)
    with ThreadPoolExecutor(1) as background:
        opening = background.submit(_opened, uri, config, folder)
        if config.tracking_uri is not None:
            opening.result()  # an address may be wrong: that is said before Ray starts
        try:
            yield opening.result
        except BaseException as error:
            if opening.exception() is None:
                interrupted = isinstance(error, KeyboardInterrupt)
                with opening.result().tolerating():
                    opening.result().close(status="KILLED" if interrupted else "FAILED")
            raise
