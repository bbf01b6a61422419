"""The command `lunar-tune search`."""

from __future__ import annotations

from dataclasses import dataclass

from lunar_tune import __version__
from lunar_tune.cli.commands import Command, CommonOptions, Reused, options_again
from lunar_tune.cli.running import say, warn
from lunar_tune.config.fields import same_option
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import Problems
from lunar_tune.report.progress import working


@dataclass(frozen=True, kw_only=True)
class SearchOptions(SearchConfig, CommonOptions):
    """What the command takes."""

    dry_run: bool = same_option(Reused, "dry_run")


def search(options: SearchOptions, problems: Problems) -> int:
    """Search for the setting that forgets most while the model keeps the rest.

    A trial is one complete unlearning run: `lunar-tune search --model tiny`

    Exit codes: 0 a feasible setting was found, 3 none was, 4 too many trials failed in a row,
    130 interrupted, 2 the input was wrong.
    """
    console, given = options.console(), dict(options.given)
    config: SearchConfig = options
    with working(console, f"lunar-tune {__version__}: reading data and search space") as doing:
        from lunar_tune.report.summary import print_plan, print_result
        from lunar_tune.search.plan import plan_search

        if options.resume is not None:
            from lunar_tune.search.resume import resumed

            anew = {name: getattr(options, name) for name in options.given}
            config, before = resumed(anew, problems)
            given = {**before, **given}
        plan = plan_search(config, problems, doing)
        from lunar_tune.report.results import load_search
        from lunar_tune.search.prerequisite import finetuning_fact
        from lunar_tune.search.resume import check_unchanged, is_finished
        from lunar_tune.search.run import run_search
        from lunar_tune.search.session import EXIT_FOUND, EXIT_INFEASIBLE
        from lunar_tune.study.folder import Folder
    if config.resume is not None:
        folder = Folder((config.output / str(config.name)).resolve())
        if (warning := check_unchanged(plan, folder)) is not None:
            warn(console, warning)
        elsewhere = "tracking_uri" in options.given
        if not options.dry_run and not elsewhere and is_finished(folder, config.num_trials):
            results = load_search(folder.path)
            say(
                console,
                f"{folder.name} is finished: {len(results.rows)} trials. A larger --num-trials "
                "gives it more.",
            )
            print_result(console, results, folder=folder.path, commands={})
            return EXIT_INFEASIBLE if results.best is None else EXIT_FOUND
    facts = {**plan.facts, **finetuning_fact(plan)}
    if options.dry_run:
        with working(console, "looking at the tracking store and where trials run"):
            from lunar_tune.search.dry_run import surroundings

            facts |= surroundings(config)
        print_plan(console, facts)
        console.print("all that needs no weights has been checked; nothing was run")
        return 0
    print_plan(console, facts)
    arguments = options_again(config, given.keys() - {"seed"})
    return run_search(plan, console, given=given, arguments=arguments)


COMMAND = Command(search, SearchOptions)
