"""`lunar-tune NAME …`: finds the command by its name; exit codes, errors and interruptions."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from lunar_tune import __version__
from lunar_tune.errors import InputError, LunarTuneError, suggestion
from lunar_tune.secrets import SecretsFormatter, without_secrets

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130
HELP_ALL = "--help-all"
_LONGEST = 500  # characters of an unexpected error; a library's text may hold whole files
_MOMENT = 0.05  # seconds
_PATIENCE = 4  # presses of Ctrl-C after which an ending that takes too long is given up

COMMANDS = {
    "search": "search for the setting that forgets most while the model keeps the rest",
    "unlearn": "unlearn once, with one setting",
    "table5": "tune every method on every model and data set, and write a table",
    "compare": "compare the trials of searches in MLflow, or on one page",
    "ask": "ask the base model and the unlearned model the same questions",
    "export": "write an unlearned model as a checkpoint or an adapter",
    "layers": "score the layers without training",
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
    """Run a command and exit; Ctrl-C while Python loads or ends has nothing to put back."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    code = EXIT_INTERRUPTED
    try:
        code = command_of(name).main(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except KeyboardInterrupt:
        pass
    if code == EXIT_INTERRUPTED:
        # All is put back. Python itself would go by the signal if that met an extension module.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


@contextmanager
def reporting_errors(*, debug: bool) -> Iterator[None]:
    """Inside, an error ends the program with one message and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows a "?"
    shown = logging.StreamHandler()
    shown.setFormatter(SecretsFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[shown])
    interrupted: Callable[[], bool] = bool
    try:
        with interrupted_once() as interrupted:
            yield
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            sys.stderr.write(without_secrets("".join(traceback.format_exception(error))))
        from rich.console import Console

        from lunar_tune.display import say

        console = Console(stderr=True, emoji=False)
        if isinstance(error, KeyboardInterrupt) or (
            # A library may make another error of it, above all while it is imported.
            interrupted() and not isinstance(error, LunarTuneError)
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


@contextmanager
def interrupted_once() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C interrupts, and the next ones do not disturb what ends then.

    What has begun is put back, written and closed: files, tracked runs, Ray's processes. The fourth
    press gives up even that. Yields what says whether there was one.
    """
    before = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()
    if not here or before not in {signal.default_int_handler, _leave}:
        yield bool  # somebody else has decided what an interruption does, or that it does nothing
        return
    presses = 0

    def interrupted(_signal: int, _frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses in {1, _PATIENCE}:
            raise KeyboardInterrupt
        if presses < _PATIENCE:
            more = _PATIENCE - presses
            os.write(
                2, f"ending; {more} more Ctrl-C to end at once, without cleaning up\n".encode()
            )

    def again(passed_over: sys.UnraisableHookArgs) -> None:
        """Interrupt a moment later where Python passes over an error, as when a weakref dies."""
        nonlocal presses
        if issubclass(passed_over.exc_type, KeyboardInterrupt):
            presses -= 1
            main = threading.main_thread().ident
            threading.Timer(_MOMENT, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            hook(passed_over)

    hook, sys.unraisablehook = sys.unraisablehook, again
    signal.signal(signal.SIGINT, interrupted)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else "--help"
    if name in COMMANDS:
        run(name, given[1:])
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
