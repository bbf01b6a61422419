"""The errors of lunar-tune: one root, one class for each way a user can meet it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")


class LunarTuneError(Exception):
    """Root of every error that lunar-tune raises on purpose."""


class InputError(LunarTuneError):
    """What the user asked for cannot be done; the message says what exists and what to do."""

    messages: tuple[str, ...] = ()  # the mistakes, where there are several


class DataError(InputError):
    """A data file, a record or a split is unusable."""


class ModelError(InputError):
    """A model cannot be found, is of an unsuitable family, or lacks something that is needed."""


class SearchSpaceError(InputError):
    """A search space or a parameter value is invalid."""


class UnknowingModelError(InputError):
    """The base model does not know the data, so nothing could be found."""


class TrialError(LunarTuneError):
    """A trial ended without valid scores; the search goes on."""


class EditedModelError(LunarTuneError):
    """A model is not what it was before a trial: nothing more may be computed with it."""


class DivergenceError(TrialError):
    """A loss or a weight became NaN or infinite."""


class Problems:
    """Collects everything that is wrong with one input so that it is said in one message.

    Example:
        >>> problems = Problems()
        >>> with problems.collect():
        ...     raise InputError("--num-trials 0: must be at least 1")
        >>> problems.messages
        ['--num-trials 0: must be at least 1']
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Note one mistake; a message noted before is not noted again."""
        if message not in self.messages:
            self.messages.append(message)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note an `InputError` that the block raises, and go on after it."""
        try:
            yield
        except InputError as error:
            for message in error.messages or (str(error),):
                self.add(message)

    def attempt(self, call: Callable[[], Result]) -> Result | None:
        """Return what a call gives; None where it raises an `InputError`, which is noted."""
        with self.collect():
            return call()
        return None  # type: ignore[unreachable]

    def raise_if_any(self, error_class: type[InputError] = InputError) -> None:
        """Raise one error with every noted mistake, if there is any."""
        if len(self.messages) == 1:
            raise error_class(self.messages[0])
        if self.messages:
            listed = "\n".join(f"  - {m}".replace("\n", "\n    ") for m in self.messages)
            error = error_class(f"{len(self.messages)} things are wrong:\n{listed}")
            error.messages = tuple(self.messages)
            raise error


def close_name(name: str, existing: Iterable[str]) -> str:
    """Return ` Did you mean …?` for a name that does not exist, or nothing if none is close."""
    close = difflib.get_close_matches(name, existing, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def suggestion(name: str, existing: Iterable[str]) -> str:
    """Return ` Did you mean …? There are: ….` for a name that does not exist."""
    names = list(existing)
    return f"{close_name(name, names)} There are: {', '.join(names) or 'none'}."


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return `a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
