"""A command: a function of a class of options, from whose fields flags, help and checks follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Group, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lunar_tune import __version__
from lunar_tune.cli.main import HELP_ALL, reporting_errors
from lunar_tune.config.fields import (
    Option,
    check_values,
    flag_of,
    from_document,
    help_of,
    option,
    options_of,
    permissions_in,
    same_option,
    types_of,
)
from lunar_tune.config.options import GROUPS, OUTPUT, SUBJECT, Reused, SearchConfig, check_permitted
from lunar_tune.display import screen
from lunar_tune.errors import InputError, Problems
from lunar_tune.files import check_writable_file
from lunar_tune.report.progress import working


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every command takes."""

    config: Path | None = option(None, group=OUTPUT, metavar="FILE", stored=False)
    """Read options from a YAML file; options on the command line win."""
    quiet: bool = same_option(Reused, "quiet")
    """Show errors only."""
    debug: bool = option(False, group=OUTPUT, stored=False)
    """Show tracebacks of errors too."""
    given: Mapping[str, str] = field(default_factory=dict)
    """Where values come from that were not left at their default, by field name."""

    @cached_property
    def console(self) -> Console:
        """The screen, on which nothing is shown if the command is to be quiet."""
        return screen(quiet=self.quiet)

    def working(self, what: str) -> AbstractContextManager[Callable[[str | None], None]]:
        """Say, inside, which version is doing what; see `report.progress.working`."""
        return working(self.console, f"lunar-tune {__version__}: {what}")


@dataclass(frozen=True, kw_only=True)
class TrialOptions(CommonOptions):
    """What a command takes that runs a search's trial again."""

    search: str = option(MISSING, group=SUBJECT, positional=True)
    """A search's folder, or its name."""
    trial: int | None = option(None, group=SUBJECT, common=True)
    """Number of the trial. Default: the confirmed best."""
    output: Path = same_option(SearchConfig, "output")
    """Folder in which searches are found by name."""
    device: str | None = same_option(SearchConfig, "device", default=None)
    """cpu, cuda or auto. Default: the search's."""
    trust_remote_code: bool = same_option(SearchConfig, "trust_remote_code")

    @property
    def trusted(self) -> bool | None:
        """Whether code of the checkpoint may run; None where the command does not say it."""
        return self.trust_remote_code if "trust_remote_code" in self.given else None


class Command:
    """A command by name; decorates what it runs, whose docstring is the help.

    That takes a dataclass that extends `CommonOptions`, and problems; it returns the exit code.
    """

    def __init__(self, run: Callable[[Any, Problems], int | None]) -> None:
        self.run, self.name = run, run.__name__
        self.options: type[Any] = types_of(run)["options"]

    def app(self, shown: str | None = None) -> App:
        """Return the command line; `shown`, if help is asked for, is common or all."""
        app = App(
            name=f"lunar-tune {self.name}",
            help=inspect.getdoc(self.run),
            help_format="markdown",
            version=__version__,
            help_epilogue=f"{HELP_ALL} shows every option." if shown == "common" else None,
            group_commands=Group("Commands", show=False),
            suppress_keyboard_interrupt=False,
        )
        kinds = types_of(self.options)
        parameters = [
            self._parameter(name, said, kinds[name], shown)
            for name, said in options_of(self.options).items()
        ]

        def take() -> None:
            """Stand for the command: cyclopts reads a line by what this function takes."""

        signature = inspect.Signature(sorted(parameters, key=lambda one: one.kind))
        take.__signature__ = signature  # type: ignore[attr-defined]
        take.__annotations__ = {one.name: one.annotation for one in parameters}
        app.default(take)
        return app

    def main(self, arguments: Sequence[str]) -> int:
        """Run the command and return its exit code."""
        given = ["--help" if one == HELP_ALL else one for one in arguments]
        with reporting_errors(debug="--debug" in given):
            is_help = not {"--help", "-h"}.isdisjoint(given)
            shown = "all" if HELP_ALL in arguments else "common"
            app = self.app(shown if is_help else None)
            try:
                called, bound, _ = app.parse_args(given, exit_on_error=False, print_error=False)
            except cyclopts.CycloptsError as error:
                advice = f"(lunar-tune {self.name} --help)"
                raise InputError(f"{str(error).strip()} {advice}") from error
            if called is not app.default_command:  # it shows help or the version
                called(*bound.args, **bound.kwargs)
                return 0
            typed = {name: value for name, value in bound.arguments.items() if value is not None}
            values = from_document(self.options, typed)
            origins = dict.fromkeys(values, "command line")
            if (file := values.get("config")) is not None:
                stated = self._from_file(file)
                permissions = permissions_in(self.options, stated)
                check_permitted(f"{file}: holds", permissions, typed.keys())
                origins = dict.fromkeys(stated, str(file)) | origins
                values = {**stated, **values}
            problems = Problems()
            for name, said in options_of(self.options).items():
                if name not in values and not hasattr(self.options, name):
                    written = name.upper() if said.positional else flag_of(name)
                    problems.add(f"{written} is needed: {help_of(self.options, name)}")
            problems.raise_if_any()
            options = self.options(**values, given=origins)
            check_values(options, problems)
            for name, said in options_of(self.options).items():
                if said.written and (file := getattr(options, name)) is not None:
                    with problems.collect():
                        check_writable_file(file, flag_of(name))
            return self.run(options, problems) or 0

    def _from_file(self, file: Path) -> dict[str, Any]:
        from lunar_tune.yaml_files import read_yaml

        document = read_yaml(file)
        if isinstance(options := document.get("options"), dict):  # what a search has kept
            known = options_of(self.options)
            document = {
                name: entry["value"]
                for name, entry in options.items()
                if isinstance(entry, dict)
                and entry.get("origin") not in {"default", "derived"}
                and (name not in known or known[name].stored)
            }
        return from_document(self.options, document, source=str(file))

    def _parameter(
        self, name: str, said: Option, kind: Any, shown: str | None
    ) -> inspect.Parameter:
        """Return an option as a parameter of a function that cyclopts could call."""
        default = getattr(self.options, name, None)
        off = f"--no-{flag_of(name).removeprefix('--')}"
        # In the help a switch has one form, the one that changes something.
        flag = off if shown and default is True else flag_of(name)
        text = ", ".join(default) if isinstance(default, tuple) else str(default)
        has_text = default not in (None, (), False, True)
        several = "tuple" in str(kind)
        has_more = "…" in str(said.metavar)
        metavar = f"{said.metavar} …" if several and not has_more else said.metavar
        parameter = Parameter(
            name=None if said.positional else flag,
            help=help_of(self.options, name),
            group=Group(said.group, sort_key=GROUPS.index(said.group)),
            show=said.common or said.positional or shown != "common",
            negative=off if kind is bool and not shown else (),
            show_default=(lambda _: text) if has_text else False,
            metavar=None if said.positional else metavar,
            consume_multiple=False,
            allow_repeating=None if several else True,
        )
        if said.positional and several:
            rest = inspect.Parameter.VAR_POSITIONAL
            return inspect.Parameter(name, rest, annotation=Annotated[str, parameter])
        by_place, by_name = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(
            name,
            by_place if said.positional else by_name,
            default=None,
            annotation=Annotated[kind | None, parameter],
        )


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return `1 edge`, `2 edges`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def plain_table(
    columns: Sequence[str],
    rows: Iterable[Iterable[object]],
    *,
    left: Collection[str] = ("",),
    folded: Collection[str] = (),
) -> Table:
    """Return a table without lines: texts in the columns `left` and `folded`, else numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_text = column in left or column in folded
        table.add_column(
            column,
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=column not in folded,
        )
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def score_table(rows: Mapping[str, Sequence[str]]) -> Table:
    """Return the headline scores of several models as a table."""
    columns = ("", "forget", "retain", "factual", "deviation score")
    return plain_table(columns, ((who, *cells) for who, cells in rows.items()))
