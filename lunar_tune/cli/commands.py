"""A command: a class of options, and a function that takes an instance of it.

From the fields of the class follow flags, help and checks (`config.fields`); cyclopts reads the
command line and writes the help.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import App, Group, Parameter

from lunar_tune import __version__
from lunar_tune.cli.running import reporting_errors
from lunar_tune.config.fields import (
    Option,
    flag_of,
    from_document,
    option,
    options_of,
    types_of,
)
from lunar_tune.config.run_options import ANSWERS, DATA, MEMORY, METHOD, MODEL
from lunar_tune.config.search_config import PLACE, SEARCH
from lunar_tune.errors import InputError, Problems

__all__ = ["Command", "CommonOptions", "Given", "Reused"]

SUBJECT, OUTPUT = "Subject", "Output"
GROUPS = (SUBJECT, MODEL, DATA, METHOD, SEARCH, ANSWERS, MEMORY, PLACE, OUTPUT)
"""Headings of the help, in their order; the first is of what a command is about."""
HELP_ALL = "--help-all"
Shown = Literal["common", "all"]
Given = Mapping[str, str]
"""Where values come from that were not left at their default, by field name."""


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every command takes."""

    config: Path | None = option(
        None,
        "Take options from a YAML file, by their names; those of the command line win.",
        OUTPUT,
        metavar="FILE",
        stored=False,
    )
    quiet: bool = option(False, "Show errors only.", OUTPUT, stored=False)
    debug: bool = option(False, "Show tracebacks of errors too.", OUTPUT, stored=False)


@dataclass(frozen=True, kw_only=True)
class Reused:
    """What several commands take, each with a help of its own (`same_option`)."""

    trial: int | None = option(None, "Number of a trial.", SUBJECT, common=True)
    json: Path | None = option(None, "Write JSON.", OUTPUT, metavar="FILE", common=True)
    save: Path | None = option(None, "Write files.", OUTPUT, metavar="DIR", common=True)
    dry_run: bool = option(
        False,
        "Check what needs no weights, show the plan, and stop.",
        PLACE,
        common=True,
        stored=False,
    )


@dataclass(frozen=True)
class Command:
    """A command by name.

    Args:
        run: Takes an instance of `options` and the origins of its values; returns the exit code,
            None for 0. Its docstring is the help.
        options: Dataclass of options.
    """

    run: Callable[[Any, Given], int | None]
    options: type[Any]

    @property
    def name(self) -> str:
        """As it is typed."""
        return self.run.__name__

    def app(self, *, shown: Shown = "all", as_help: bool = False) -> App:
        """Return the command line.

        Args:
            shown: Options that the help names.
            as_help: Whether it is only to be shown: a switch has one form then.
        """
        app = App(
            name=f"lunar-tune {self.name}",
            help=inspect.getdoc(self.run),
            help_format="markdown",
            version=__version__,
            help_epilogue=None if shown == "all" else f"{HELP_ALL} shows every option.",
            group_commands=Group("Commands", show=False),
            suppress_keyboard_interrupt=False,
        )
        app.default(self._taken(shown=shown, as_help=as_help))
        return app

    def main(self, arguments: Sequence[str]) -> int:
        """Run the command and return its exit code."""
        everything = HELP_ALL in arguments
        given = ["--help" if one == HELP_ALL else one for one in arguments]
        with reporting_errors(debug="--debug" in given):
            app = self.app(
                shown="all" if everything else "common",
                as_help=not {"--help", "-h"}.isdisjoint(given),
            )
            values = self._values(app, given)
            if values is None:
                return 0
            origins = dict.fromkeys(values, "command line")
            if (file := values.get("config")) is not None:
                stated = self._from_file(file)
                origins = dict.fromkeys(stated, str(file)) | origins
                values = {**stated, **values}
            self._check_needed(values)
            return self.run(self.options(**values), origins) or 0

    def _values(self, app: App, arguments: Sequence[str]) -> dict[str, Any] | None:
        """Return what was given, by field; None where help or version was shown."""
        try:
            values = app(
                arguments, exit_on_error=False, print_error=False, result_action="return_value"
            )
        except cyclopts.CycloptsError as error:
            raise InputError(f"{str(error).strip()} (lunar-tune {self.name} --help)") from error
        return values if isinstance(values, dict) else None

    def _check_needed(self, values: Mapping[str, Any]) -> None:
        problems = Problems()
        for name, said in options_of(self.options).items():
            if name not in values and _default(self.options, name) is MISSING:
                problems.add(f"{_written(name, said)} is needed: {said.help}")
        problems.raise_if_any(InputError)

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

    def _taken(self, *, shown: Shown, as_help: bool) -> Callable[..., dict[str, Any]]:
        """Return a function whose signature is the options, each None where it is not given."""
        kinds = types_of(self.options)
        parameters = [
            self._parameter(
                name, said, kinds[name], is_shown=shown == "all" or said.common, as_help=as_help
            )
            for name, said in options_of(self.options).items()
        ]
        signature = inspect.Signature(sorted(parameters, key=lambda one: one.kind))

        def take(*positional: Any, **values: Any) -> dict[str, Any]:
            bound = signature.bind(*positional, **values).arguments
            given = {name: value for name, value in bound.items() if value not in (None, ())}
            return from_document(self.options, given)

        take.__signature__ = signature  # type: ignore[attr-defined]
        take.__annotations__ = {one.name: one.annotation for one in parameters}
        return take

    def _parameter(
        self, name: str, said: Option, kind: Any, *, is_shown: bool, as_help: bool
    ) -> inspect.Parameter:
        default, off = _default(self.options, name), f"--no-{name.replace('_', '-')}"
        flag = off if as_help and default is True else flag_of(name)
        text = ", ".join(default) if isinstance(default, tuple) else str(default)
        has_text = default not in (None, (), False, True, MISSING)
        parameter = Parameter(
            name=None if said.positional else flag,
            help=said.help,
            group=Group(said.group, sort_key=GROUPS.index(said.group)),
            show=is_shown or said.positional,
            negative=off if kind is bool and not as_help else (),
            show_default=(lambda _: text) if has_text else False,
            metavar=None if said.positional else _metavar(said, kind),
            consume_multiple=False,
            allow_repeating=None if "tuple" in str(kind) else True,
        )
        if said.positional and "tuple" in str(kind):
            several = inspect.Parameter.VAR_POSITIONAL
            return inspect.Parameter(name, several, annotation=Annotated[str, parameter])
        return inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_ONLY
            if said.positional
            else inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, parameter],
        )


def _default(owner: type[Any], name: str) -> Any:
    return next(one.default for one in fields(owner) if one.name == name)


def _metavar(said: Option, kind: Any) -> str | None:
    several = "tuple" in str(kind) and not said.commas
    return f"{said.metavar} …" if several else said.metavar


def _written(name: str, said: Option) -> str:
    return name.upper() if said.positional else flag_of(name)
