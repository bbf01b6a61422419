"""`lunar-tune NAME …`: finds the command by its name; exit codes, errors and interruptions."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from lunar_tune import __version__
from lunar_tune.errors import InputError, LunarTuneError, suggestion
from lunar_tune.secrets import SecretsFormatter, without_secrets
from lunar_tune.signals import (
    EXIT_INTERRUPTED,
    interrupted_once,
    is_interrupted,
    leave,
    outlast_outputs,
    output_problem,
)

EXIT_FAILED, EXIT_INPUT = 1, 2
HELP_ALL = "--help-all"
_LONGEST = 500  # characters of an unexpected error; a library's text may hold whole files

COMMANDS = {
    "search": "search for the setting that forgets most while the model keeps the rest",
    "unlearn": "unlearn once, with one setting",
    "table5": "tune every method on every model and data set, and write a table",
    "compare": "compare the trials of searches in MLflow, or on one page",
    "ask": "ask the base model and the unlearned model the same questions",
    "export": "write an unlearned model as a checkpoint or an adapter",
    "layers": "score the layers without training",
    "collect": "make data of what a model knows by itself",
    "finetune": "teach a model the data of which it will forget a part",
    "describe": "show what a data file holds",
    "models": "show the models that have a name",
    "fetch": "fetch published data sets",
    "cache": "show or empty the cache of activations",
}


def command_of(name: str) -> Any:
    """Return a command (`cli.commands.Command`) by its name."""
    return getattr(importlib.import_module(f"lunar_tune.cli.{name}"), name)


def run(name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit; an interruption while Python loads or ends leaves at once."""
    outlast_outputs()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}:
            signal.signal(number, leave)
    code = EXIT_INTERRUPTED
    try:
        code = command_of(name).main(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except KeyboardInterrupt:
        pass
    sys.stdout.flush()
    if (problem := output_problem()) is not None:
        sys.stderr.write(f"error: the output is not whole: {problem}\n")
        code = code or EXIT_FAILED
    if code == EXIT_INTERRUPTED:
        # All is put back. Python itself would go by the signal if that met an extension module.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def reporting_errors(*, debug: bool) -> Iterator[None]:
    """Inside, an error ends the program with one message and an exit code."""
    shown = logging.StreamHandler()
    shown.setFormatter(SecretsFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[shown])
    with interrupted_once():
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            _report(error, debug=debug)


def _report(error: BaseException, *, debug: bool) -> NoReturn:
    """Say what has ended the program, and exit with the code that stands for it."""
    from lunar_tune.display import say, screen, visible

    console = screen(stderr=True)
    if debug:
        told = without_secrets("".join(traceback.format_exception(error)))
        sys.stderr.write(visible(told))
    if isinstance(error, KeyboardInterrupt) or (
        # A library may make another error of it, above all while it is imported.
        is_interrupted() and not isinstance(error, LunarTuneError)
    ):
        console.print("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    if isinstance(error, LunarTuneError):
        console.print("[bold red]error:[/bold red]", end=" ")
        say(console, without_secrets(str(error)))
        sys.exit(EXIT_INPUT if isinstance(error, InputError) else EXIT_FAILED)
    console.print("[bold red]unexpected error:[/bold red]", end=" ")
    first = without_secrets(next(iter(str(error).splitlines()), ""))[:_LONGEST]
    where = "" if debug else "run the command again with --debug to see where; "
    advice = f"({where}if this is a bug of lunar-tune, please report it)"
    say(console, f"{type(error).__name__}: {first} {advice}")
    sys.exit(EXIT_FAILED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else "--help"
    if name in COMMANDS:
        run(name, given[1:])
    outlast_outputs()
    if name in {"--help", "-h", HELP_ALL}:
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
        text = (
            f"Tune LLM unlearning: lunar-tune COMMAND …\n\n{lines}\n\n"
            f"lunar-tune COMMAND --help explains a command, {HELP_ALL} shows all of its options;\n"
            "also: --version, --install-completion."
        )
    elif name == "--version":
        text = f"lunar-tune {__version__}"
    elif name == "--install-completion":
        from cyclopts import App

        app = App(name="lunar-tune", version=__version__)
        for name in COMMANDS:
            app.command(command_of(name).app(), name=name)
        text = f"written to {app.install_completion()}; open a new shell"
    else:
        sys.stderr.write(f"error: unknown command {name!r}.{suggestion(name, COMMANDS)}\n")
        sys.exit(EXIT_INPUT)
    print(text)  # noqa: T201
