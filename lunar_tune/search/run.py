"""A whole search, from its configuration to its outputs and exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from lunar_tune import __version__
from lunar_tune.config.search_config import EXPERIMENT, SearchConfig
from lunar_tune.errors import InputError
from lunar_tune.models.lineage import read_lineage
from lunar_tune.report.log_file import RECORD, search_log
from lunar_tune.report.progress import tiny_progress, working
from lunar_tune.search.backends import Backend, InProcess, Resources
from lunar_tune.search.plan import SearchPlan, make_folder
from lunar_tune.search.prerequisite import finetune_first, finetuning_fact, finetuning_job
from lunar_tune.search.resume import alone, signature_of, unfinished_like
from lunar_tune.search.session import SearchSession, UnknowingModelError
from lunar_tune.study.folder import Folder
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import StoredStudy
from lunar_tune.tracking.store import default_tracking_uri, opened_store
from lunar_tune.tracking.sync import Tracker, remove
from lunar_tune.trial.assemble import materialise

__all__ = ["Ended", "run_search"]


class Ended(NamedTuple):
    """How a search ended."""

    code: int
    """The command's exit code."""
    folder: Folder | None = None
    """Where it is; None where nothing was run."""


def run_search(
    plan: SearchPlan,
    console: Console,
    *,
    given: Mapping[str, str],
    arguments: Sequence[str] | None,
) -> Ended:
    """Run a planned search; see `SearchSession` for the arguments.

    Raises:
        InputError: The base model makes success impossible, or something cannot be reached.
    """
    alike = None
    if plan.config.name is None:
        alike = unfinished_like(signature_of(plan), plan.config.output)
    if alike is not None:
        console.print(
            f"[yellow]the same search is unfinished:[/yellow] {escape(alike.name)} (go on with it: "
            f"python -m lunar_tune.search --resume {escape(str(alike.path))}); this is a new one",
            soft_wrap=True,
        )
    facts = {**plan.facts, **finetuning_fact(plan)}
    with tiny_progress(console) as on_progress:
        plan = dataclasses.replace(plan, spec=materialise(plan.spec, on_progress))
    folder = make_folder(plan.config, plan.spec)
    more = "" if plan.config.in_process else ", starting Ray"
    opening = [f"search {folder.name}, lunar-tune {__version__}"]
    opening += [f"{label.strip()}: {value}" for label, value in facts.items()]
    with (
        alone(folder),
        _given_back_if_unused(folder, new=plan.config.resume is None),
        search_log(folder.log, console, opening),
        working(console, "opening the tracking store" + more) as doing,
        _tracking(plan.config, folder) as opened,
        _backend(plan.config, folder) as (backend, resources),
        _told_of_the_end(),  # after Ray, which puts a handler of its own
    ):
        tracker = opened()  # what the store cannot do is said before anything is computed
        doing(None)
        if not resources.gpus and plan.spec.model.device == "auto":
            plan = _with_model(plan, device="cpu")  # Ray leaves GPUs visible that it has not given
        session = SearchSession(
            plan,
            folder,
            backend,
            resources,
            tracker,
            console=console,
            given=given,
            arguments=arguments,
        )
        code = _run_knowing(session)
        RECORD.info("ended with exit code %d", code)
        return Ended(code, folder)


def _run_knowing(session: SearchSession) -> int:
    """Run the search, after the model has learned the data if it has to and may."""
    plan, console = session.plan, session.console
    if (job := finetuning_job(plan)) is None:
        return session.run()
    from lunar_tune.finetuning.finetune import kept_folder

    weights = str(kept_folder(job))
    if read_lineage(weights) is None:
        try:
            return session.run()
        except UnknowingModelError as error:
            console.print(f"{str(error).partition(':')[0]}: it learns them first")
            finetune_first(job, console, session.tracker, text=plan.config.text)
    console.print(f"the model has learned the data: {weights}", soft_wrap=True)
    session.plan = _with_model(plan, weights=weights)
    if session.arguments is not None:
        session.arguments = [*session.arguments, "--model-path", weights]
    try:
        return session.run()
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
        import torch

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
def _told_of_the_end() -> Iterator[None]:
    """Inside, a machine that is taken away and says so ends the search as an interruption does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = signal.getsignal(signal.SIGINT)  # none where Ctrl-C is ignored
    handler = heard if callable(heard) else signal.default_int_handler
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _given_back_if_unused(folder: Folder, *, new: bool) -> Iterator[None]:
    """Remove the folder if the search ends before its first trial, so that its name is free."""
    try:
        yield
    except BaseException:
        if not folder.is_taken or (new and not _has_trials(folder)):
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _has_trials(folder: Folder) -> bool:
    with contextlib.suppress(InputError, OSError):  # what cannot be read is left as it is
        stored = StoredStudy.read(folder.journal)
        return stored is not None and bool(stored.rows)
    return True


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
                # There may be no study yet, or one that does not know its run yet.
                with contextlib.suppress(InputError, OSError, LookupError):
                    search = StoredSearch.read(folder.path)
                    if _has_trials(folder) or config.resume is not None:
                        opening.result().search(search)
                    else:
                        with opened_store(opening.result().uri) as client:
                            remove(search, client)
            raise
