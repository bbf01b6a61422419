"""A search's log, `search.log` in its folder.

2026-11-25 13:08:02+0000 INFO    trial 3/30  L14 c2.0 lr0.003  forget 0.041  …
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control

from lunar_tune.secrets import without_secrets

RECORD = logging.getLogger("lunar_tune.record")
"""For the log alone: while one is open, nothing of it reaches the screen."""

# Loggers of libraries that keep their records from the root.
_APART = ("ray", "optuna", "mlflow", "transformers", "peft", "alembic", "sqlalchemy")
_WIDE = 10_000  # no line is broken


def tell(console: Console, line: str) -> None:
    """Print a line; on a terminal, where a display that moves shows the same, only log it."""
    if console.is_terminal:
        RECORD.info("%s", line)
    else:
        console.print(line, markup=False, soft_wrap=True)


@contextmanager
def search_log(path: Path, console: Console, opening: Sequence[str] = ()) -> Iterator[None]:
    """Inside, a log is written, `opening` its first lines; one that is there is gone on with.

    What is printed on the console is logged too, also when it is quiet. Whatever ends the search is
    in the log with its traceback.
    """
    handler = _FileHandler(path, encoding="utf-8", errors="replace")
    handler.addFilter(_once)
    loggers = [logging.getLogger(name) for name in (*_APART, RECORD.name, None)]
    level, propagate = RECORD.level, RECORD.propagate
    console.push_render_hook(_Printed())  # below those of displays, which come and go
    try:
        RECORD.setLevel(logging.INFO)
        RECORD.propagate = False
        for logger in loggers:
            logger.addHandler(handler)
        logging.captureWarnings(True)
        for line in opening:
            RECORD.info("%s", line)
        yield
    except KeyboardInterrupt:
        RECORD.warning("interrupted")
        raise
    except BaseException:
        RECORD.exception("ended by an error")
        raise
    finally:
        logging.captureWarnings(False)
        for logger in loggers:
            logger.removeHandler(handler)
        RECORD.setLevel(level)
        RECORD.propagate = propagate
        console.pop_render_hook()
        with suppress(OSError):  # what could not be written cannot be now
            handler.close()


class _FileHandler(logging.FileHandler):
    """Writes records without secrets, in a form of its own; a full disk ends no search."""

    _form = logging.Formatter(
        "%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S%z"
    )

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as it is written; Ray gives every handler a formatter of its own."""
        return without_secrets(self._form.format(record).rstrip())

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: it would be said again with every line."""


class _Printed(RenderHook):
    """Hears of everything that is printed on a console."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Log what is printed, line by line, and change nothing of it."""
        text = io.StringIO()
        plain = Console(
            file=text,
            width=_WIDE,
            color_system=None,
            force_terminal=False,
            force_jupyter=False,  # else a notebook shows it
            emoji=False,
        )
        for one in renderables:
            if not isinstance(one, Control):  # of which a display that moves prints nothing else
                plain.print(one, soft_wrap=True, highlight=False)
        for line in filter(str.strip, text.getvalue().splitlines()):
            RECORD.info("%s", line.rstrip())
        return renderables


def _once(record: logging.LogRecord) -> bool:
    """Let a record pass once, though it may come from its library's logger and from the root."""
    wanted = record.name == RECORD.name or record.levelno >= logging.WARNING
    again = getattr(record, "in_search_log", False)
    record.in_search_log = True
    return wanted and not again
