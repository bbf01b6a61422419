"""`lunar-tune NAME …`: finds the command by its name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lunar_tune import __version__
from lunar_tune.cli.commands import HELP_ALL, Command
from lunar_tune.cli.running import EXIT_INPUT
from lunar_tune.errors import suggestion

__all__ = ["run"]

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


def command_of(name: str) -> Command:
    """Return a command by its name."""
    command: Command = importlib.import_module(f"lunar_tune.cli.{name}").COMMAND
    return command


def run(name: str) -> None:
    """Run a command with this process's arguments, and exit."""
    sys.exit(command_of(name).main(sys.argv[1:]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else "--help"
    if name in COMMANDS:
        sys.exit(command_of(name).main(given[1:]))
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
