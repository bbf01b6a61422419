"""How commands take the options of a run.

Covers: a decorator that adds them to a command and hands it what was given, merging that with
defaults, with the origin of each value.
Does not cover: which options there are (`run_options`), options of one command alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

from lunar_tune.cli.options.run_options import LUNAR, MODEL_PANEL, PANELS, RUN_OPTIONS, RunOption
from lunar_tune.config.run_options import RunOptions
from lunar_tune.errors import Problems

__all__ = [
    "MODEL_PANEL",
    "PANELS",
    "GivenOptions",
    "merge_for_all",
    "merge_options",
    "run_options",
    "was_given",
    "with_run_options",
]


@dataclass(frozen=True, slots=True)
class GivenOptions:
    """What was given on the command line."""

    values: Mapping[RunOption, Any]
    """Value by option, as Typer read it; only what was given."""
    origins: Mapping[str, str]
    """Origin by first part of the field's name, for `config.yaml`."""


def merge_for_all(base: RunOptions, given: GivenOptions, problems: Problems) -> RunOptions:
    """Return `base` with what was given, for whatever methods take it; see `merge_options`."""
    merged: Any = base
    for option, value in given.values.items():
        for path in dict.fromkeys((option.path, option.gradient_path or option.path)):
            with problems.collect():
                merged = _replaced(merged, path.split("."), option.parse(value))
    options: RunOptions = merged
    return options


def merge_options(base: RunOptions, given: GivenOptions, problems: Problems) -> RunOptions:
    """Return `base` with what was given in its place; a value out of range is noted."""
    merged: Any = base
    method = next((v for o, v in given.values.items() if o.path == "method"), base.method)
    paths = {option: option.path_for(method) for option in given.values}
    for option, value in given.values.items():
        with problems.collect():
            merged = _replaced(merged, paths[option].split("."), option.parse(value))
    options: RunOptions = merged
    others = "gradient." if method == LUNAR else "lunar."
    for option, path in paths.items():
        if path.startswith(others):
            problems.add(f"{option.flag} has no meaning with --method {method}.")
        elif not _concerns(path, options.lunar.solver):
            problems.add(f"{option.flag} has no meaning with --solver {options.lunar.solver}.")
    return options


def _concerns(path: str, solver: str) -> bool:
    """Say whether a field has a meaning with LUNAR's solver."""
    if path == "lunar.rank":
        return solver == "lora"
    return not path.startswith("lunar.adamw.") or solver != "closed_form"


def with_run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a Typer command all of the run's options; it receives them as the argument `given`."""
    return _with_options(command, RUN_OPTIONS)


def run_options(
    *,
    panels: Collection[str] = (),
    flags: Collection[str] = (),
    without: Collection[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator like `with_run_options` that gives some of the options.

    Args:
        panels: Panels of which a command takes all.
        flags: Single options.
        without: Options that it does not take although their panel is named.

    Raises:
        ValueError: There is no such panel or option; a mistake in the program.
    """
    known = {option.flag for option in RUN_OPTIONS} | {option.panel for option in RUN_OPTIONS}
    if unknown := {*panels, *flags, *without} - known:
        raise ValueError(f"unknown panels or options: {', '.join(sorted(unknown))}")
    chosen = tuple(
        o for o in RUN_OPTIONS if (o.panel in panels or o.flag in flags) and o.flag not in without
    )
    return functools.partial(_with_options, options=chosen)


def _with_options(
    command: Callable[..., Any], options: Collection[RunOption]
) -> Callable[..., Any]:
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "given"
    ]
    shared = [_parameter(option) for option in options]

    @functools.wraps(command)
    def wrapper(ctx: typer.Context, **arguments: Any) -> Any:
        taken = {option: arguments.pop(_name(option)) for option in options}
        return command(ctx=ctx, given=_given(ctx, taken), **arguments)

    parameters = [own[0], *shared, *own[1:]]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def was_given(ctx: typer.Context, name: str) -> bool:
    """Say whether a parameter was given, rather than left at its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _given(ctx: typer.Context, taken: Mapping[RunOption, Any]) -> GivenOptions:
    values: dict[RunOption, Any] = {}
    origins: dict[str, str] = {}
    for option, value in taken.items():
        if not was_given(ctx, _name(option)):
            continue
        values[option] = value
        origins[option.path.split(".")[0]] = "command line"
    return GivenOptions(values=values, origins=origins)


def _parameter(option: RunOption) -> inspect.Parameter:
    default: Any = RunOptions()
    for name in option.path.split("."):
        default = getattr(default, name)
    if option.path == "decoding.max_new_tokens" or default == ():
        default = None
    if option.path == "lunar.retain_points":
        default = "all"
    declaration = typer.Option(
        option.flag, help=option.help, metavar=option.metavar, rich_help_panel=option.panel
    )
    return inspect.Parameter(
        _name(option),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[option.kind, declaration],
    )


def _name(option: RunOption) -> str:
    return option.flag.partition("/")[0].removeprefix("--").replace("-", "_")


def _replaced(part: Any, path: list[str], value: Any) -> Any:
    """Return a frozen dataclass with one field, at any depth, replaced."""
    if len(path) > 1:
        value = _replaced(getattr(part, path[0]), path[1:], value)
    return dataclasses.replace(part, **{path[0]: value})
