"""The command `lunar-tune search`."""

from __future__ import annotations

from dataclasses import dataclass

from lunar_tune.cli.commands import Command, CommonOptions
from lunar_tune.config.fields import same_option
from lunar_tune.config.options import Reused, SearchConfig
from lunar_tune.errors import Problems


@dataclass(frozen=True, kw_only=True)
class SearchOptions(SearchConfig, CommonOptions):
    """What the command takes."""

    dry_run: bool = same_option(Reused, "dry_run")


@Command
def search(options: SearchOptions, problems: Problems) -> int:
    """Search for the setting that forgets most while the model keeps the rest.

    A trial is one complete unlearning run: `lunar-tune search --model tiny`

    Exit codes: 0 a feasible setting was found, 3 none was, 4 too many trials failed in a row,
    130 interrupted, 2 the input was wrong.
    """
    with options.working("reading data and search space") as doing:
        from lunar_tune.driver.run import start_search

        code, _ = start_search(
            options,
            options.given,
            console=options.console,
            problems=problems,
            doing=doing,
            dry_run=options.dry_run,
        )
    return code
