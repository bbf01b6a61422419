"""A whole search, from what it is told to its outputs and exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.markup import escape

from lunar_tune import __version__
from lunar_tune.config.fields import options_again, options_of
from lunar_tune.config.options import EXPERIMENT, SearchConfig
from lunar_tune.display import say, warn
from lunar_tune.driver.backends.cluster import opened_backend
from lunar_tune.driver.persistence import (
    alone,
    check_unchanged,
    is_finished,
    resumed,
    signature_of,
    unfinished_like,
)
from lunar_tune.driver.plan import SearchPlan, make_folder, plan_search
from lunar_tune.driver.prerequisite import (
    ask_first,
    finetune_first,
    finetuning_fact,
    finetuning_job,
)
from lunar_tune.driver.session import EXIT_FOUND, EXIT_INFEASIBLE, SearchSession
from lunar_tune.errors import InputError, Problems, UnknowingModelError
from lunar_tune.models.catalog import read_lineage
from lunar_tune.report.progress import RECORD, search_log, working
from lunar_tune.report.results import SearchResults
from lunar_tune.report.summary import print_plan, print_result
from lunar_tune.secrets import without_password
from lunar_tune.signals import interrupted_once
from lunar_tune.study.folder import Folder
from lunar_tune.study.stored_search import StoredSearch
from lunar_tune.study.study import StoredStudy
from lunar_tune.tracking.address import (
    URI_VARIABLE,
    default_tracking_uri,
    named_uri,
    of_environment,
    uri_of_environment,
    with_password,
)
from lunar_tune.tracking.store import look_at, opened_store
from lunar_tune.tracking.sync import Tracker, remove
from lunar_tune.trial.assemble import first_prompts, materialise


def start_search(
    config: SearchConfig,
    given: Mapping[str, str],
    *,
    console: Console,
    problems: Problems,
    doing: Callable[[str | None], object],
    dry_run: bool = False,
    show_commands: bool = True,
) -> tuple[int, Folder | None]:
    """Check a search or raise an InputError, show what is planned, and run it or go on with it.

    With `resume`, `config` is what is to change. `given` are origins of options that were not left
    at their default, `problems` known already. `doing` hears what takes long while nothing is shown
    yet, and None when something is. `show_commands` says in the end what may be wanted next. Return
    the command's exit code, and the search's folder; None for a `dry_run`.
    """
    told, folder = dict(given), None
    if config.resume is not None:
        known = options_of(SearchConfig)
        config, before = resumed({n: getattr(config, n) for n in given if n in known}, problems)
        told, folder = {**before, **told}, Folder((config.output / str(config.name)).resolve())
    elif (uri := problems.attempt(lambda: named_uri(config.tracking_uri))) != config.tracking_uri:
        config, told["tracking_uri"] = dataclasses.replace(config, tracking_uri=uri), URI_VARIABLE
    plan = plan_search(config, problems, doing)
    plan = _with_prompts(plan)
    doing(None)
    if folder is not None and (warning := check_unchanged(plan, folder)) is not None:
        warn(console, warning)
    uri = default_tracking_uri(config.output)
    is_other = uri_of_environment() is not None and of_environment(uri) is None
    if folder is not None and config.tracking_uri is None and is_other:
        warn(console, f"{URI_VARIABLE} is not heeded: {folder.name} has its runs in {uri}")
    elsewhere = dry_run or "tracking_uri" in given
    if folder is not None and not elsewhere and is_finished(folder, config):
        results = SearchResults.read(folder.path)
        have = sum(row.counts for row in results.rows)
        wanted = ["a larger --num-trials"] * (have >= config.num_trials)
        wanted += ["--stop never"] * results.study.knows_enough
        said = f"{folder.name} is finished: {have} trials. Give {' and '.join(wanted)} for more."
        console.print(said, markup=False, soft_wrap=True)
        print_result(console, results, folder=folder.path, commands={})
        return EXIT_INFEASIBLE if results.best is None else EXIT_FOUND, folder
    facts = {**plan.facts, **finetuning_fact(plan)}
    if dry_run:
        doing("looking at the tracking store and where trials run")
        facts |= _surroundings(config)
        doing(None)
    if told.get("tracking_uri") == URI_VARIABLE:
        place = facts.get("tracking", without_password(str(config.tracking_uri)))
        facts["tracking"] = f"{place} ({URI_VARIABLE})"
    print_plan(console, facts)
    if dry_run:
        console.print("all that needs no weights has been checked; nothing was run")
        return EXIT_FOUND, None
    arguments = options_again(config, told.keys() - {"seed"}) if show_commands else None
    return run_search(plan, console, given=told, arguments=arguments)


def _with_prompts(plan: SearchPlan) -> SearchPlan:
    """Return the plan with the first prompt of each set to show, or raise a ModelError."""
    spec = plan.spec
    shown = first_prompts(spec.model, spec.chat, spec.first_questions)
    return dataclasses.replace(plan, prompts=shown)


def _surroundings(config: SearchConfig) -> dict[str, str]:
    """Return what a search would meet, which is left as it is, or raise an InputError."""
    problems = Problems()
    uri = config.tracking_uri or default_tracking_uri(config.output)
    store = problems.attempt(lambda: look_at(with_password(uri, "the search"), EXPERIMENT))
    place = "this process, one trial at a time" if config.in_process else "this machine, by Ray"
    if config.address is not None:
        with problems.collect(), opened_backend(config, Folder(config.output)) as (_, each):
            trials = f"{each.concurrency} trials at once, each with {each.cpus:g} CPU cores"
            place = f"the cluster at {config.address}: {trials} and {each.gpus:g} GPUs"
    problems.raise_if_any()
    output = f"{config.output.resolve()} can be written"
    return {"output": output, "tracking": str(store), "runs on": place}


def run_search(
    plan: SearchPlan,
    console: Console,
    *,
    given: Mapping[str, str],
    arguments: Sequence[str] | None,
) -> tuple[int, Folder]:
    """Run a planned search or raise an InputError; return the exit code and the folder."""
    if plan.spec.data.unanswered:
        ask_first(plan, console)
        plan = _with_prompts(plan_search(plan.config))  # with the answers
        say(console, f"data: {plan.facts['data']}")
        begun = Folder(plan.config.output / str(plan.config.resume))
        if plan.config.resume is not None and (warning := check_unchanged(plan, begun)) is not None:
            warn(console, warning)
    alike, facts = None, {**plan.facts, **finetuning_fact(plan)}
    if plan.config.name is None:
        alike = unfinished_like(signature_of(plan), plan.config.output)
    if alike is not None:
        console.print(
            f"[yellow]the same search is unfinished:[/yellow] {escape(alike.name)} (resume it: "
            f"python -m lunar_tune.search {escape(shlex.join(plan.config.resuming(alike.path)))}); "
            "this is a new search",
            soft_wrap=True,
        )
    plan = dataclasses.replace(plan, spec=materialise(plan.spec, console))
    folder = make_folder(plan.config, plan.spec)
    more = "" if plan.config.in_process else ", starting Ray"
    opening = [f"search {folder.name}, lunar-tune {__version__}"]
    opening += [f"{label.strip()}: {value}" for label, value in facts.items()]
    with (
        interrupted_once(),  # for callers in Python
        alone(folder),
        search_log(folder.log, console, opening),
        working(console, "opening the tracking store" + more) as doing,
        _tracking(plan.config, folder) as opened,
        opened_backend(plan.config, folder) as (backend, resources),
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
        return code, folder


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
            say(console, f"{str(error).partition(':')[0]}: fine-tuning the model first")
            finetune_first(job, console, session.tracker, text=plan.config.text)
    say(console, f"the model has learned the data: {weights}")
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
            f"{weights} to train again."
        ) from error


def _with_model(plan: SearchPlan, **changes: Any) -> SearchPlan:
    model = dataclasses.replace(plan.spec.model, **changes)
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, model=model))


@contextlib.contextmanager
def _tracking(config: SearchConfig, folder: Folder) -> Iterator[Callable[[], Tracker]]:
    """Open the store while Ray starts; an error that ends the search ends its run too.

    One before the first trial removes run and folder, so that the name is free.
    """
    uri = config.tracking_uri or default_tracking_uri(config.output)
    with ThreadPoolExecutor(1) as background:
        opening = background.submit(Tracker, uri, EXPERIMENT, folder.name)
        try:
            if config.tracking_uri is not None:
                opening.result()  # an address may be wrong: that is said before Ray starts
            yield opening.result
        except BaseException:
            is_kept = True
            with contextlib.suppress(InputError, OSError):  # what cannot be read is left as it is
                is_kept = config.resume is not None or bool(StoredStudy.read(folder.journal).rows)
            if opening.exception() is None:
                # There may be no study yet, or one that does not know its run yet.
                with contextlib.suppress(InputError, OSError, LookupError):
                    search = StoredSearch.read(folder.path)
                    if is_kept:
                        opening.result().search(search)
                    else:
                        with opened_store(opening.result().uri) as client:
                            remove(search, client)
            if not is_kept or not folder.is_taken:
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
