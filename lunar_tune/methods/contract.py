"""The contract that every unlearning method keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from lunar_tune.config.fields import types_of
from lunar_tune.errors import InputError, Problems
from lunar_tune.registry import Registry
from lunar_tune.training import typed_settings
from lunar_tune.training.adapting import Edit, Fit

if TYPE_CHECKING:
    from lunar_tune.engine.activations import PromptActivations
    from lunar_tune.models.loading import LoadedModel
    from lunar_tune.training.answer_loss import Pair

__all__ = ["METHODS", "Edit", "Fit", "Method", "PreparedMethod", "UnlearningTask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlearningTask:
    """What a method works on: a model, encoded questions and answers, and activations."""

    activations: PromptActivations
    """The base model's, on the questions to forget and to keep at least."""
    forget_pairs: tuple[Pair, ...]
    """The questions to forget with their true answers."""
    retain_pairs: tuple[Pair, ...]
    reference_prompts: tuple[tuple[int, ...], ...]
    """Prompts that the model declines to answer."""
    refusals: tuple[tuple[int, ...], ...] = ()
    """Answers that decline, each with the token that ends it."""

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        return self.activations.source.loaded


class PreparedMethod(ABC):
    """A method made ready for one model and one data split."""

    @abstractmethod
    def unlearning(
        self, parameters: Mapping[str, Any], *, seed: int
    ) -> AbstractContextManager[Fit]:
        """Return a context in which the model is being unlearned, as far as its fit is driven.

        After it the model is bit for bit what it was, also when the body raises. `seed` is of
        everything random in the fit. Parameters that are missing, unknown or out of range raise an
        InputError, a fit that fails, for example by divergence, a TrialError.
        """


class Method(ABC):
    """A method with its fixed settings; picklable, and light to make."""

    name: str
    """Name in the registry."""
    settings_type: type
    """Dataclass of what is fixed over a search."""
    variant_setting: str
    """The setting that decides which parameters are searched: `solver` of LUNAR, `trained` of the
    gradient methods."""
    variants: tuple[str, ...]
    """What that setting may be; the first is the default."""
    parameters: tuple[str, ...]
    """Names of the parameters that a trial sets."""
    usual: Mapping[str, float] = MappingProxyType({})
    """Values of parameters that a single run may leave out; a search's space names all."""
    unused: frozenset[str] = frozenset()
    """Settings that the variant does not look at."""
    edits_one_layer: bool = False
    """Whether its fits name an `edited_layer`."""
    along_vectors: bool = False
    """Whether it moves along unlearning vectors, so that layers can be scored without a fit."""
    adapter: Literal["exact", "approximate", "none"] = "none"
    """How what a fit changes can be written as an adapter: by factors that it has itself
    (`Edit.factors`), by factors of the matrices' differences, or not in a useful way."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.variant: str = getattr(settings, self.variant_setting)

    @property
    def optional_parameters(self) -> tuple[str, ...]:
        """Names of settings that a trial may set as well: the numbers that are in use."""
        kinds = types_of(self.settings_type).items()
        return tuple(n for n, kind in kinds if kind not in {str, bool} and n not in self.unused)

    @classmethod
    def names_in_use(cls, variant: str) -> set[str]:
        """Return the parameters and settings that one of the variants looks at."""
        method = cls(cls.settings_type(**{cls.variant_setting: variant}))
        names = {*method.parameters, *types_of(cls.settings_type)}
        return names - {cls.variant_setting, *method.unused}

    @abstractmethod
    def prepare(self, task: UnlearningTask) -> PreparedMethod:
        """Do what depends on model and data alone; say what the data lack."""

    def sees_retain(self, parameters: Mapping[str, Any]) -> bool:  # noqa: ARG002  # of some methods
        """Say whether a fit with such parameters is given what is to be kept."""
        return True

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Check names, or raise an InputError; a method adds what it can check without a model."""
        wanted, given = set(self.parameters), set(parameters)
        known = wanted.union(self.optional_parameters)
        if not wanted <= given <= known:
            taken, missing, unknown = (
                ", ".join(sorted(names)) or "none"
                for names in (wanted, wanted - given, given - known)
            )
            raise InputError(
                f"--method {self.name} ({self.variant}) takes {taken}; missing: {missing}; "
                f"unknown: {unknown}."
            )


def number_of(name: str, value: Any, *, positive: bool = False) -> float:
    """Return a parameter that is a finite (or positive) number, or raise an InputError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (positive and number <= 0):
        raise InputError(
            f"{name} {value}: must be a {'positive' if positive else 'finite'} number."
        )
    return number


METHODS: Registry[type[Method]] = Registry("method", group="lunar_tune.methods")


def configure_method(
    name: str, *, solver: str | None = None, fixed: Mapping[str, Any] | None = None
) -> tuple[Method, dict[str, Any]]:
    """Return a method with its settings, and what else is fixed: parameters of the search.

    `solver` is LUNAR's, where `fixed`, settings and parameters by name, does not say it. An
    InputError says everything that does not exist or means nothing.
    """
    kind, problems = METHODS[name], Problems()
    given = dict(fixed or {})
    if solver is not None:
        if kind.variant_setting != "solver":
            problems.add(f"--solver {solver} has no meaning with --method {name}.")
        elif given.setdefault("solver", solver) != solver:
            problems.add(f"--solver {solver} contradicts --fix solver={given['solver']}.")
    known = types_of(kind.settings_type)
    values = typed_settings(kind.settings_type, given, problems)
    parameters = {key: value for key, value in given.items() if key not in known}
    with problems.collect():
        method = kind(kind.settings_type(**values))
        for key in sorted(values.keys() & method.unused):
            problems.add(f"{key} has no meaning with --solver {method.variant}.")
        for key in sorted(parameters.keys() - {*method.parameters}):
            problems.add(
                f"--fix {key}: --method {name} ({method.variant}) has no such parameter or "
                f"setting. There are: {', '.join((*method.parameters, *known))}."
            )
    problems.raise_if_any()
    return method, parameters
