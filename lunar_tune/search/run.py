"""A whole search, from its configuration to its outputs and exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.markup import escape

from lunar_tune import __version__
from lunar_tune.config.search_config import EXPERIMENT, SearchConfig
from lunar_tune.errors import InputError
from lunar_tune.report.progress_bars import build_progress, epochs_shown
from lunar_tune.report.results import load_search
from lunar_tune.search.backends.choice import open_backend
from lunar_tune.search.backends.interface import Resources
from lunar_tune.search.display.log_file import RECORD, search_log
from lunar_tune.search.display.summary import print_plan, print_result
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
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.tracking.store import default_tracking_uri
from lunar_tune.tracking.sync import Tracker
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
        open_backend(plan.config, folder) as (backend, resources),
    ):
        opened()  # what the store cannot do is said before anything is computed
        plan = _on_device(plan, resources)
        start = functools.partial(
            SearchSession,
            folder=folder,
            backend=backend,
            resources=resources,
            opened=opened,
            console=console,
            given=given,
            signature=signature,
            brief=brief,
        )
        code = _run_knowing(plan, start, console, arguments, opened)
        RECORD.info("ended with exit code %d", code)
        return code


def show_finished(folder: Folder, console: Console) -> int:
    """Show what a finished search has found; return its exit code."""
    results = load_search(folder.path)
    console.print(
        f"{escape(folder.name)} is finished: {len(results.rows)} trials. A larger --num-trials "
        "gives it more.",
        highlight=False,
        soft_wrap=True,
    )
    print_result(console, results.report, folder=folder.path, commands={})
    return EXIT_INFEASIBLE if results.best is None else EXIT_FOUND


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
    opened: Callable[[], Tracker],
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
            first.fulfil(console, opened())
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


@contextlib.contextmanager
def _tracking(config: SearchConfig, folder: Folder) -> Iterator[Callable[[], Tracker]]:
    """Open the store while Ray starts; an error that ends the search ends its run too."""
    uri = config.tracking_uri or default_tracking_uri(config.output)
    with ThreadPoolExecutor(1) as background:
        opening = background.submit(Tracker, uri, EXPERIMENT, folder.name)
        if config.tracking_uri is not None:
            opening.result()  # an address may be wrong: that is said before Ray starts
        try:
            yield opening.result
        except BaseException:
            if opening.exception() is None:
                with contextlib.suppress(InputError, OSError):  # there may be no study yet
                    opening.result().search(StoredSearch.read(folder.path))
            raise
