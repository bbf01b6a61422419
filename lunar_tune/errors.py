"""The errors of lunar-tune: one root, one class for each way a user can meet it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

__all__ = [
    "DataError",
    "DivergenceError",
    "EditedModelError",
    "InputError",
    "LunarTuneError",
    "ModelError",
    "Problems",
    "SearchSpaceError",
    "TrialError",
]

Result = TypeVar("Result")


class LunarTuneError(Exception):
    """Root of every error that lunar-tune raises on purpose."""


class InputError(LunarTuneError):
    """What the user asked for cannot be done; the message says what exists and what to do."""

    messages: tuple[str, ...] = ()
    """Each of several mistakes; empty where the error is about one."""


class DataError(InputError):
    """A data file, a record or a split is unusable."""


class ModelError(InputError):
    """A model cannot be found, is of an unsuitable family, or lacks something that is needed."""


class SearchSpaceError(InputError):
    """A search space or a parameter value is invalid."""


class TrialError(LunarTuneError):
    """A trial ended without valid scores; the search goes on."""


class EditedModelError(LunarTuneError):
    """A model is not what it was before a trial: nothing more may be computed with it."""


class DivergenceError(TrialError):
    """A loss or a weight became NaN or infinite."""


class _Collecting:
    """The context of `Problems.collect`."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if isinstance(error, InputError):
            for message in error.messages or (str(error),):
                self._problems.add(message)
            return True
        return False


class Problems:
    """Collects everything that is wrong with one input so that it is said in one message.

    Example:
        >>> problems = Problems()
        >>> with problems.collect():
        ...     raise InputError("--num-trials 0: at least 1")
        >>> len(problems.messages)
        1
    """

    def __init__(self) -> None:
        """Start with nothing wrong."""
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Note one mistake; a message noted before is not noted again."""
        if message not in self.messages:
            self.messages.append(message)

    def collect(self) -> _Collecting:
        """Turn an `InputError` raised inside into a noted mistake and go on after the block."""
        return _Collecting(self)

    def attempt(self, call: Callable[[], Result]) -> Result | None:
        """Return what a call gives; None where it raises an `InputError`, which is noted."""
        with self.collect():
            return call()
        return None

    def raise_if_any(self, error_class: type[InputError] = InputError) -> None:
        """Raise one error with every noted mistake.

        Raises:
            InputError: Something was noted; `error_class` is raised.
        """
        if len(self.messages) == 1:
            raise error_class(self.messages[0])
        if self.messages:
            listed = "\n".join(f"  - {m}".replace("\n", "\n    ") for m in self.messages)
            error = error_class(f"{len(self.messages)} things are wrong:\n{listed}")
            error.messages = tuple(self.messages)
            raise error
