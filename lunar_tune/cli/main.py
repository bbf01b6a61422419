"""`lunar-tune NAME …`: finds the command by its name."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from lunar_tune import __version__
from lunar_tune.errors import suggestion

__all__ = ["run"]

EXIT_INPUT, EXIT_INTERRUPTED, HELP_ALL = 2, 130, "--help-all"

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
    "fetch": "fetch published data sets",
    "cache": "show or empty the cache of activations",
}


def command_of(name: str) -> Any:
    """Return a command (`cli.commands.Command`) by its name."""
    return importlib.import_module(f"lunar_tune.cli.{name}").COMMAND


def run(name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command with these arguments, or with this process's, and exit.

    Ctrl-C before and after the command, while Python loads or ends, has nothing to put back.
    """
    before = signal.getsignal(signal.SIGINT)
    heeded = before is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, _leave)
    command = command_of(name)
    if heeded:
        signal.signal(signal.SIGINT, before)
    code = EXIT_INTERRUPTED
    try:
        code = command.main(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except KeyboardInterrupt:
        pass
    finally:
        if heeded:
            signal.signal(signal.SIGINT, _leave)
    if code == EXIT_INTERRUPTED:
        # All is put back. Python itself would go by the signal if that met an extension module.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else "--help"
    if name in COMMANDS:
        run(name, given[1:])
    if name in {"--help", "-h", HELP_ALL}:
        text = _overview()
    elif name == "--version":
        text = f"lunar-tune {__version__}"
    elif name == "--install-completion":
        text = _completion()
    else:
        sys.stderr.write(f"error: unknown command {name!r}.{suggestion(name, COMMANDS)}\n")
        sys.exit(EXIT_INPUT)
    print(text)  # noqa: T201


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        f"Tune LLM unlearning: lunar-tune COMMAND …\n\n{lines}\n\n"
        f"lunar-tune COMMAND --help explains a command, {HELP_ALL} shows all of its options;\n"
        "--version, --install-completion."
    )


def _completion() -> str:
    """Install completion for the shell that is in use; return what was done."""
    from cyclopts import App

    app = App(name="lunar-tune", version=__version__)
    for name in COMMANDS:
        app.command(command_of(name).app(), name=name)
    return f"written to {app.install_completion()}; open a new shell"
