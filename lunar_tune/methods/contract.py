"""The contract that every unlearning method keeps.

Covers: the three lifetimes of a method: its settings (once per search), its preparation (once per
worker: what depends on model and data alone) and an unlearned model (once per trial: what depends
on the searched parameters).
Does not cover: evaluation; whoever holds the context evaluates inside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError
from lunar_tune.registry import Registry

if TYPE_CHECKING:
    from lunar_tune.activations.prompts import PromptActivations
    from lunar_tune.models.loading import LoadedModel
    from lunar_tune.training.likelihood import Pair

__all__ = ["METHODS", "FitReport", "Method", "MethodInfo", "Preparation", "Subject"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a method works on: a model, encoded questions and answers, and activations."""

    activations: PromptActivations
    """Of the unmodified model, on the forget and retain prompts at least."""
    forget_prompts: tuple[tuple[int, ...], ...]
    """Questions to forget."""
    retain_prompts: tuple[tuple[int, ...], ...]
    """Questions to keep."""
    reference_prompts: tuple[tuple[int, ...], ...]
    """Prompts that the model declines to answer."""
    forget_pairs: tuple[Pair, ...] = ()
    """The questions to forget with their true answers."""
    retain_pairs: tuple[Pair, ...] = ()
    """The questions to keep with theirs."""
    refusals: tuple[tuple[int, ...], ...] = ()
    """Answers that decline, each with the token that ends it."""

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        return self.activations.source.loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """What a fit leaves to be looked at."""

    losses: tuple[float, ...]
    """Training loss of each epoch; one value for a closed form."""
    edited_layer: int | None = None
    """The block whose down-projection is changed, with nothing changed below it and nothing else in
    it: what lies below is then as in the unmodified model, and an evaluation need not compute it
    again. None promises nothing."""


class Preparation(ABC):
    """A method made ready for one model and one data split."""

    @abstractmethod
    def unlearned(
        self, parameters: Mapping[str, Any], *, seed: int
    ) -> AbstractContextManager[FitReport]:
        """Return a context in which the model is unlearned.

        After it the model is bit for bit what it was, also when the body raises.

        Args:
            parameters: A value for each of the method's parameters.
            seed: Of everything random in the fit.

        Raises:
            InputError: A parameter is missing, unknown or out of range.
            TrialError: The fit failed, for example by divergence.
        """


class Method(ABC):
    """A method with its fixed settings; picklable, and light to make."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in the registry."""

    @property
    @abstractmethod
    def variant(self) -> str:
        """What, beside the name, decides which parameters are searched, for example the solver."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that a trial sets."""

    @property
    def optional_parameters(self) -> tuple[str, ...]:
        """Names of fixed settings that a trial may set as well."""
        return ()

    @abstractmethod
    def prepare(self, subject: Subject) -> Preparation:
        """Do what depends on model and data alone."""

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Check that the method's parameters are there and nothing that it does not know.

        Raises:
            InputError: One is missing or unknown.
        """
        wanted, given = set(self.parameters), set(parameters)
        known = wanted.union(self.optional_parameters)
        if not wanted <= given <= known:
            missing = _flags(wanted - given) or "none"
            unknown = _flags(given - known) or "none"
            raise InputError(
                f"--method {self.name} ({self.variant}) takes {_flags(self.parameters)}; "
                f"missing: {missing}; unknown: {unknown}."
            )


def _flags(names: Collection[str]) -> str:
    """Return parameters as a user writes them."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A registry entry: how to name a method before it is configured."""

    summary: str
    """One line for `--help` and tables."""
    variants: tuple[str, ...]
    """What `--solver` (LUNAR) or `--train` (gradient methods) may say."""


METHODS: Registry[MethodInfo] = Registry("method")
