"""From what a search is told to its end: what a command and Python have in common.

What is heavy is loaded after the checks that do not need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lunar_tune import __version__
from lunar_tune.config.fields import options_again, options_of
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import Problems
from lunar_tune.report.progress import working

if TYPE_CHECKING:
    from lunar_tune.search.run import Ended

__all__ = ["start_search"]


def start_search(
    config: SearchConfig,
    given: Mapping[str, str],
    *,
    console: Console,
    problems: Problems,
    dry_run: bool = False,
    show_commands: bool = True,
) -> Ended:
    """Check a search, show what is planned, and run it or go on with it.

    `given` says where values come from that were not left at their default. A dry run ends before
    anything is run; `show_commands` says in the end which commands may be wanted next.

    Raises:
        InputError: Something is wrong; all of it is said at once.
    """
    told = dict(given)
    with working(console, f"lunar-tune {__version__}: reading data and search space") as doing:
        from lunar_tune.report.summary import print_plan, print_result
        from lunar_tune.search.plan import plan_search

        if config.resume is not None:
            from lunar_tune.search.resume import resumed

            known = options_of(SearchConfig)
            config, before = resumed({n: getattr(config, n) for n in given if n in known}, problems)
            told = {**before, **told}
        plan = plan_search(config, problems, doing)
        from lunar_tune.report.results import SearchResults
        from lunar_tune.search.prerequisite import finetuning_fact
        from lunar_tune.search.resume import check_unchanged, is_finished
        from lunar_tune.search.run import Ended, run_search
        from lunar_tune.search.session import EXIT_FOUND, EXIT_INFEASIBLE
        from lunar_tune.study.folder import Folder
    if config.resume is not None:
        folder = Folder((config.output / str(config.name)).resolve())
        if (warning := check_unchanged(plan, folder)) is not None:
            console.print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)
        elsewhere = "tracking_uri" in given
        if not dry_run and not elsewhere and is_finished(folder, config.num_trials):
            results = SearchResults.read(folder.path)
            said = f"{folder.name} is finished: {len(results.rows)} trials. A larger --num-trials "
            console.print(f"{said}gives it more.", markup=False, soft_wrap=True)
            print_result(console, results, folder=folder.path, commands={})
            return Ended(EXIT_INFEASIBLE if results.best is None else EXIT_FOUND, folder)
    facts = {**plan.facts, **finetuning_fact(plan)}
    if dry_run:
        with working(console, "looking at the tracking store and where trials run"):
            from lunar_tune.search.dry_run import surroundings

            facts |= surroundings(config)
        print_plan(console, facts)
        console.print("all that needs no weights has been checked; nothing was run")
        return Ended(EXIT_FOUND)
    print_plan(console, facts)
    arguments = options_again(config, told.keys() - {"seed"}) if show_commands else None
    return run_search(plan, console, given=told, arguments=arguments)
