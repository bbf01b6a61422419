"""The contract that every unlearning method keeps."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lunar_tune.config.fields import typed_setting, types_of
from lunar_tune.errors import InputError, Problems
from lunar_tune.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from lunar_tune.engine.prompt_activations import PromptActivations
    from lunar_tune.models.loading import LoadedModel
    from lunar_tune.training.adapting import Factors
    from lunar_tune.training.answer_loss import Pair

__all__ = [
    "METHODS",
    "AdapterKind",
    "Edit",
    "Fit",
    "FitReport",
    "Method",
    "MethodEntry",
    "PreparedMethod",
    "UnlearningTask",
    "configure_method",
    "number_of",
    "numbers_of",
    "searchable",
    "with_settings",
]

Settings = TypeVar("Settings")
AdapterKind = Literal["exact", "approximate", "none"]
"""How what a method changes can be written as an adapter: by factors that it has itself, by factors
of the matrices' differences, or not in a useful way, since any weight may have changed."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """What is known of a fit at its end."""

    losses: tuple[float, ...]
    """Training loss of each epoch; one value for a closed form."""
    edited_layer: int | None = None
    """The block whose down-projection is changed, with nothing changed below it and nothing else in
    it, so that an evaluation need not compute again what lies below. None promises nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What a finished fit has changed, to be read inside its context."""

    weights: Callable[[], Mapping[str, Tensor]]
    """Gives the new value of every parameter that may have changed, in the model's number format,
    by its name in a saved checkpoint. A tensor may be the model's own: copy what is to outlive the
    context."""
    factors: Callable[[], Mapping[str, Factors]] | None = None
    """Gives what was added to weights as products of low rank, by the linear map's name; None where
    it is none. A name with `.weight` behind it is one of `weights`."""
    merged: bool = False
    """Whether the model computes with an adapter beside its weights now, so that a model with
    `weights` answers with another rounding."""


@dataclass(slots=True, kw_only=True)
class Fit:
    """A fit under way: whoever holds it drives it epoch by epoch and may end it early."""

    base_model: Callable[[], AbstractContextManager[Any]]
    """Inside, the model is the base model again; after, what the fit had made of it; both bit for
    bit, and as often as is wanted."""
    edit: Edit
    losses: Sequence[float] = ()
    """Training losses so far; all of them for a fit that has no epochs to watch."""
    epochs: Iterable[float] = ()
    """Trains an epoch for each loss that it yields, and leaves the model to be evaluated."""
    n_epochs: int = 0
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Inside, the model may be evaluated between two epochs."""
    finish: Callable[[], object] = lambda: None
    """Called once after the last epoch that is wanted."""
    edited_layer: int | None = None
    """See `FitReport`."""

    def __iter__(self) -> Iterator[int]:
        """Train; yield the number of epochs done after each."""
        for loss in self.epochs:
            self.losses = (*self.losses, loss)
            yield len(self.losses)

    def finished(self) -> FitReport:
        """End the fit where it is: the model is then unlearned."""
        self.finish()
        return FitReport(losses=tuple(self.losses), edited_layer=self.edited_layer)


class PreparedMethod(ABC):
    """A method made ready for one model and one data split."""

    @abstractmethod
    def unlearning(
        self, parameters: Mapping[str, Any], *, seed: int
    ) -> AbstractContextManager[Fit]:
        """Return a context in which the model is being unlearned, as far as its fit is driven.

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

    name: str
    """Name in the registry."""
    variant: str
    """What, beside the name, decides which parameters are searched, for example the solver."""
    parameters: tuple[str, ...]
    """Names of the parameters that a trial sets."""
    optional_parameters: tuple[str, ...] = ()
    """Names of settings that a trial may set as well."""
    edits_one_layer: bool = False
    """Whether its fits name an `edited_layer`."""
    adapter: AdapterKind = "none"
    """How what a fit changes can be written as an adapter; exact promises `Edit.factors`."""

    @abstractmethod
    def prepare(self, subject: UnlearningTask) -> PreparedMethod:
        """Do what depends on model and data alone; say what the data lack."""

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Check names; a method adds what it can check of values without the model.

        Raises:
            InputError: A parameter is missing, unknown or out of range.
        """
        wanted, given = set(self.parameters), set(parameters)
        known = wanted.union(self.optional_parameters)
        if not wanted <= given <= known:
            missing = _listed(wanted - given) or "none"
            unknown = _listed(given - known) or "none"
            raise InputError(
                f"--method {self.name} ({self.variant}) takes {_listed(self.parameters)}; "
                f"missing: {missing}; unknown: {unknown}."
            )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


def searchable(settings: object) -> tuple[str, ...]:
    """Return the names of the settings that a trial may set: the numbers that are in use."""
    unused = {*getattr(settings, "without_use", ())}
    kinds = types_of(type(settings))
    return tuple(n for n, kind in kinds.items() if kind not in {str, bool} and n not in unused)


def with_settings(settings: Settings, parameters: Mapping[str, Any]) -> Settings:
    """Return fixed settings, a dataclass, with what a trial sets of them among its parameters.

    Raises:
        InputError: A value is of another type, or out of range.
    """
    kinds = types_of(type(settings))
    values = {
        name: typed_setting(name, value, kinds[name])
        for name, value in parameters.items()
        if name in kinds
    }
    fixed: Any = settings
    changed: Settings = dataclasses.replace(fixed, **values)
    return changed


def number_of(name: str, value: Any, *, positive: bool = False) -> float:
    """Return a parameter that is one number.

    Raises:
        InputError: It is none, or not positive although it has to be.
    """
    numbers = numbers_of(name, value)
    if len(numbers) != 1 or (positive and numbers[0] <= 0):
        raise InputError(f"{name} {value}: a {'positive' if positive else 'finite'} number.")
    return numbers[0]


def numbers_of(name: str, value: Any) -> tuple[float, ...]:
    """Return a parameter that is one finite number or a list of them.

    Raises:
        InputError: It is something else.
    """
    values = value if isinstance(value, list | tuple) else (value,)
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{name} {value}: finite numbers.")
    return numbers


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """What the registry knows of a method."""

    name: str
    variants: tuple[str, ...]
    """What its variant may be; the first is the default."""
    variant_setting: str
    """The setting that says which: `solver` of LUNAR, `trained` of the gradient methods."""
    settings: type
    """Dataclass of what is fixed over a search; its `without_use`, if any, names what a variant
    does not look at."""
    build: Callable[[Any], Method]
    along_vectors: bool = False
    """Whether it moves along unlearning vectors, so that layers can be scored without a fit."""

    def names_in_use(self, variant: str) -> set[str]:
        """Return the parameters and settings that one of its variants looks at."""
        settings = self.settings(**{self.variant_setting: variant})
        unused = {self.variant_setting, *getattr(settings, "without_use", ())}
        return {*self.build(settings).parameters, *types_of(self.settings)} - unused


METHODS: Registry[MethodEntry] = Registry("method", group="lunar_tune.methods")

_folder = str(Path(__file__).parent)
_names = [one.name for one in pkgutil.walk_packages([_folder], "lunar_tune.methods.")]
_modules = [importlib.import_module(name) for name in _names if name != __name__]
_entries: list[MethodEntry] = [one.ENTRY for one in _modules if hasattr(one, "ENTRY")]
for _entry in sorted(_entries, key=lambda one: (one.name != "lunar", one.name)):
    METHODS.register(_entry.name, _entry)


def configure_method(
    name: str, *, solver: str | None = None, fixed: Mapping[str, Any] | None = None
) -> tuple[Method, dict[str, Any]]:
    """Return a method with its settings, and what else is fixed: parameters of the search.

    Args:
        name: In the registry.
        solver: LUNAR's way to fit; None is what `fixed` says, or the default.
        fixed: Settings and parameters by name.

    Raises:
        InputError: There is no such method or setting, or one means nothing; all of it is said.
    """
    entry, problems = METHODS[name], Problems()
    given = dict(fixed or {})
    if solver is not None:
        if entry.variant_setting != "solver":
            problems.add(f"--solver {solver} has no meaning with --method {name}.")
        elif given.setdefault("solver", solver) != solver:
            problems.add(f"--solver {solver} contradicts --fix solver={given['solver']}.")
    kinds = types_of(entry.settings)
    values: dict[str, Any] = {}
    for key in [key for key in given if key in kinds]:
        with problems.collect():
            values[key] = typed_setting(key, given.pop(key), kinds[key])
    with problems.collect():
        settings = entry.settings(**values)
        method = entry.build(settings)
        for key in sorted(values.keys() & getattr(settings, "without_use", ())):
            problems.add(f"{key} has no meaning with --solver {method.variant}.")
        for key in sorted(given.keys() - {*method.parameters}):
            problems.add(
                f"--fix {key}: --method {name} ({method.variant}) has no such parameter or "
                f"setting. There are: {', '.join((*method.parameters, *kinds))}."
            )
    problems.raise_if_any()
    return method, given
