"""The command `lunar-tune search`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from lunar_tune.cli.commands import Command, CommonOptions, Given, Reused
from lunar_tune.cli.printed import options_again
from lunar_tune.cli.running import say
from lunar_tune.config.fields import same_option
from lunar_tune.config.search_config import SearchConfig
from lunar_tune.errors import Problems

__all__ = ["COMMAND", "SearchOptions"]


@dataclass(frozen=True, kw_only=True)
class SearchOptions(SearchConfig, CommonOptions):
    """What the command takes."""

    dry_run: bool = same_option(
        Reused, "dry_run", help="Check what needs no weights, show the plan, and stop."
    )


def search(options: SearchOptions, given: Given) -> int:
    """Search for the setting that forgets most while the model keeps the rest.

    A trial is one complete unlearning run: `lunar-tune search --model tiny`

    Exit codes: 0 a feasible setting was found, 3 none was, 4 too many trials failed in a row,
    130 interrupted, 2 the input was wrong.
    """
    from lunar_tune.search.display.summary import print_plan
    from lunar_tune.search.plan import plan_search
    from lunar_tune.search.prerequisite import finetuning_fact
    from lunar_tune.search.resume import check_unchanged, is_finished, resumed
    from lunar_tune.search.run import run_search, show_finished
    from lunar_tune.study.folder import Folder

    problems, origins = Problems(), dict(given)
    config: SearchConfig = options
    if options.resume is not None:
        anew = {name: getattr(options, name) for name in given}
        config, before = resumed(anew, problems)
        origins = {**before, **origins}
    console = Console(quiet=options.quiet, emoji=False, highlight=False)
    plan = plan_search(config, problems)
    if config.resume is not None:
        folder = Folder((config.output / str(config.name)).resolve())
        if (warning := check_unchanged(plan, folder)) is not None:
            say(console, f"warning: {warning}")
        elsewhere = "tracking_uri" in given
        if not options.dry_run and not elsewhere and is_finished(folder, config.num_trials):
            return show_finished(folder, console)
    if options.dry_run:
        print_plan(console, {**plan.facts, **finetuning_fact(plan)})
        console.print("all that needs no weights has been checked; nothing was run")
        return 0
    return run_search(plan, console, given=origins, arguments=options_again(config, origins))


COMMAND = Command(search, SearchOptions)
