"""A whole search, from its configuration to its outputs and exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from lunar_tune import __version__
from lunar_tune.config.search_config import EXPERIMENT, SearchConfig
from lunar_tune.errors import InputError
from lunar_tune.finetuning.finetune import kept_folder
from lunar_tune.models.lineage import read_lineage
from lunar_tune.report.progress_bars import build_progress, epochs_shown
from lunar_tune.report.results import load_search
from lunar_tune.search.backends import Backend, InProcess, Resources
from lunar_tune.search.display.log_file import RECORD, search_log
from lunar_tune.search.display.summary import print_plan, print_result
from lunar_tune.search.plan import SearchPlan, make_folder
from lunar_tune.search.prerequisite import finetune_first, finetuning_fact, finetuning_job
from lunar_tune.search.resume import alone, signature_of, unfinished_like
from lunar_tune.search.session import (
    EXIT_FOUND,
    EXIT_INFEASIBLE,
    SearchSession,
    UnknowingModelError,
)
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
        InputError: The base model makes success impossible, or something cannot be reached.
    """
    facts, signature = {**plan.facts, **finetuning_fact(plan)}, signature_of(plan)
    if not brief:
        print_plan(console, facts)
    if plan.config.name is None and (begun := unfinished_like(signature, plan.config.output)):
        console.print(
            f"[yellow]the same search is unfinished:[/yellow] {escape(begun.name)} (go on with it: "
            f"python -m lunar_tune.search --resume {escape(str(begun.path))}); this is a new one",
            soft_wrap=True,
        )
    with build_progress(console) as bar:
        built = materialise(plan.spec, epochs_shown(bar, "building the tiny model (once)"))
    plan = dataclasses.replace(plan, spec=built)
    folder = make_folder(plan.config, plan.spec)
    opening = [f"search {folder.name}, lunar-tune {__version__}"]
    opening += [f"{label.strip()}: {value}" for label, value in facts.items()]
    with (
        alone(folder),
        _given_back_if_unused(folder),
        search_log(folder.log, console, opening),
        _tracking(plan.config, folder) as opened,
        _backend(plan.config, folder) as (backend, resources),
    ):
        opened()  # what the store cannot do is said before anything is computed
        if not resources.gpus and plan.spec.model.device == "auto":
            plan = _with_model(plan, device="cpu")  # Ray leaves GPUs visible that it has not given
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


def _run_knowing(
    plan: SearchPlan,
    start: Callable[[SearchPlan], SearchSession],
    console: Console,
    arguments: Sequence[str],
    opened: Callable[[], Tracker],
) -> int:
    """Run the search, after the model has learned the data if it has to and may."""
    job = None if plan.config.force else finetuning_job(plan)
    if job is None:
        return start(plan).run(arguments)
    weights = str(kept_folder(job))
    if read_lineage(weights) is None:
        try:
            return start(plan).run(arguments)
        except UnknowingModelError as error:
            console.print(f"{str(error).partition(':')[0]}: it learns them first")
            finetune_first(job, console, opened())
    console.print(f"the model has learned the data: {weights}", soft_wrap=True)
    try:
        return start(_with_model(plan, weights=weights)).run([*arguments, "--model-path", weights])
    except UnknowingModelError as error:
        found = str(error).partition(":")[0]
        raise UnknowingModelError(
            f"the model was fine-tuned and still does not know the data ({found}). Train it longer "
            "with python -m lunar_tune.finetune and give the result with --model-path, or remove "
            f"{weights} to train anew."
        ) from error


def _with_model(plan: SearchPlan, **changes: Any) -> SearchPlan:
    model = dataclasses.replace(plan.spec.model, **changes)
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, model=model))


@contextlib.contextmanager
def _backend(config: SearchConfig, folder: Folder) -> Iterator[tuple[Backend, Resources]]:
    """Give who runs the tasks of a search, and what each of them uses.

    Raises:
        InputError: A cluster cannot be reached, or has less than a trial wants.
    """
    if config.in_process:
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        cpus = float(os.cpu_count() or 1)
        yield InProcess(), Resources(cpus=cpus, gpus=float(on_gpu), concurrency=1)
        return
    from lunar_tune.search.backends.ray.cluster import allocate_resources, ray_session

    with ray_session(config):
        from lunar_tune.search.backends.ray.backend import OnRay  # Ray reads its environment then

        resources = allocate_resources(config)
        yield OnRay(resources, folder, config.trial_timeout), resources


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


def show_finished(folder: Folder, console: Console) -> int:
    """Show what a finished search has found; return its exit code."""
    results = load_search(folder.path)
    console.print(
        f"{escape(folder.name)} is finished: {len(results.rows)} trials. A larger --num-trials "
        "gives it more.",
        soft_wrap=True,
    )
    print_result(console, results, folder=folder.path, commands={})
    return EXIT_INFEASIBLE if results.best is None else EXIT_FOUND
