"""Commands as a user starts them, in a process of their own, and in this one."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lunar_tune.cli.commands import Command
from lunar_tune.config.options import RunOptions

TIMEOUT = 300

SMALL_SPACE = """
lunar:
  adamw:
    parameters:
      layer: {type: int, low: 0, high: 2}
      coefficient: {type: float, low: 0.5, high: 4.0}
      learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}
  closed_form:
    parameters:
      layer: {type: int, low: 0, high: 2}
      coefficient: {type: float, low: 0.5, high: 4.0}
      ridge: {type: choice, values: [1e-2, 1e-1]}
"""


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment with one thread, a wide screen and a stray Ray address."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
        "RAY_ADDRESS": "127.0.0.1:1",  # a search without --address is not to look there
        "HF_HUB_OFFLINE": "1",
        **more,
    }


@dataclass(frozen=True)
class Result:
    """How a command in this process ended and what it printed."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """All that was printed."""
        return self.stdout + self.stderr


def without_ray(
    command: Command, *arguments: object, stdin: bytes = b"", columns: int = 160, **more: str
) -> Result:
    """Call a command in this process, where it is over before it needs a worker.

    Args:
        command: What is called.
        *arguments: As they are typed.
        stdin: What is on standard input, which is no terminal.
        columns: Width of the screen.
        **more: Further environment variables.
    """
    output, errors = io.StringIO(), io.StringIO()
    environment = {"COLUMNS": str(columns), "TERM": "dumb", **more}
    with (
        patch.dict(os.environ, environment),
        patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            code = command.main([str(one) for one in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return Result(code, output.getvalue(), errors.getvalue())


def succeeded(command: Command, *arguments: object, **more: Any) -> str:
    """Return what a command shows that ends well."""
    result = without_ray(command, *arguments, **more)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def refused(command: Command, *arguments: object, **more: Any) -> str:
    """Return the one message of a command that is refused."""
    result = without_ray(command, *arguments, **more)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    return result.stderr


def start(arguments: Sequence[str], *, cwd: Path, **more: str) -> subprocess.Popen[str]:
    """Start a program in a session of its own, which heeds an interrupt.

    What a shell starts in the background ignores interrupts, and so does all that it starts.
    """
    here = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            list(arguments),
            cwd=cwd,
            env=environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, here)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a started program; one that takes too long is ended with all it started."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise AssertionError(f"{process.args} took too long\n{output}\n{errors}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def pages_shown(process: subprocess.Popen[str]) -> dict[str, str]:
    """Return the addresses that a comparison prints, by what they show; it runs on."""
    assert process.stdout is not None
    printed: list[str] = []
    while not printed or "Ctrl-C" not in printed[-1]:
        printed.append(next(process.stdout))
    return dict(re.findall(r"^(.+): (http\S+)$", "".join(printed), flags=re.MULTILINE))


def command(name: str, *arguments: str) -> list[str]:
    """Return the command line of one of the project's commands."""
    return [sys.executable, "-m", f"lunar_tune.{name}", *arguments]


def run_command(
    name: str, *arguments: str, cwd: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands to its end."""
    return finish(start(command(name, *arguments), cwd=cwd, **more))


def small_data(folder: Path) -> Path:
    """Write three edges of three pairs each."""
    items = [(edge, f"{n} of {edge}") for edge in ("A_B", "B_C", "C_D") for n in range(3)]
    pairs = [
        {"edge": edge, "question": f"What is item {item}?", "answer": f"Kettle {item}"}
        for edge, item in items
    ]
    path = folder / "pairs.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    return path


def small_values(model: Path, folder: Path) -> dict[str, Any]:
    """Return options of a run on a random model that is over in no time."""
    prompts = folder / "prompts.txt"
    prompts.write_text("What is nowhere?\nWho is nobody?\n", encoding="utf-8")
    return {
        "model": str(model),
        "data": str(small_data(folder)),
        "factual_data": "none",
        "reference_prompts": str(prompts),
        "reference_check": "never",
        "max_new_tokens": 4,
        "device": "cpu",
    }


def small_run(model: Path, folder: Path, **changes: Any) -> RunOptions:
    """Return such a run, which keeps no activations."""
    return RunOptions(**(small_values(model, folder) | {"cache_limit": 0} | changes))


def small_options(model: Path, folder: Path) -> list[str]:
    """Return such a run as it is typed, with `space.yaml` in the folder."""
    (folder / "space.yaml").write_text(SMALL_SPACE, encoding="utf-8")
    options = small_values(model, folder) | {"fix": "epochs=2"}
    return [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
