"""Search spaces: which values the search may try, read from a YAML file and checked.

One file a model, a section for each method, in it one for each variant (LUNAR's is the solver):

    lunar:
      adamw:
        parameters:
          layer: {type: int, low: 10, high: 24}
          coefficient: {type: float, low: 0.5, high: 6.0}
          learning_rate: {type: float, low: 1e-4, high: 3e-2, log: true}
        starting_points:
          - {layer: 18, coefficient: 2.0, learning_rate: 0.01}

Kinds: int, float, choice, fixed, and for `layer` alone depth, in fractions of the model's depth
(0 is the first block, 1 the last), which become an int range once the number of blocks is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lunar_tune.errors import Problems, SearchSpaceError
from lunar_tune.paths import search_spaces_dir, shipped_spaces
from lunar_tune.search.space.space_kinds import Choice, Fixed, FloatRange, IntRange, Parameter
from lunar_tune.search.space.space_sections import (
    admitted_values,
    choose_section,
    read_sections,
    resolve_section,
)
from lunar_tune.yaml_files import read_yaml, suggestion

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = [
    "Choice",
    "Fixed",
    "FloatRange",
    "IntRange",
    "Parameter",
    "SearchSpace",
    "load_space",
]

DEFAULT: Final = "default"


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """The values that one study may try."""

    method: str
    variant: str
    """Variant of the method; LUNAR's is the solver."""
    parameters: Mapping[str, Parameter]
    """Every parameter of the method, in its order."""
    starting_points: tuple[Mapping[str, int | float], ...]
    """Settings to try first."""
    origin: str
    """Where it was read: a file, or the default by depth."""

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return Optuna's distributions; a fixed value is one that holds a single value."""
        return {name: kind.distribution() for name, kind in self.parameters.items()}

    def describe(self) -> list[tuple[str, str]]:
        """Return name and range of each parameter, for a table."""
        return [(name, kind.describe()) for name, kind in self.parameters.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `config.yaml`; `parameters` reads back as a file's would."""
        return {
            "origin": self.origin,
            "method": self.method,
            "variant": self.variant,
            "parameters": {n: kind.model_dump(mode="json") for n, kind in self.parameters.items()},
            "starting_points": [dict(point) for point in self.starting_points],
        }

    def values_of(self, name: str) -> tuple[int, ...]:
        """Return the whole numbers that a parameter may take; none for one that is not searched."""
        kind = self.parameters.get(name)
        if isinstance(kind, IntRange):
            low, high = kind.bounds
            return tuple(range(low, high + 1))
        if isinstance(kind, Choice):
            return tuple(int(value) for value in kind.values)
        return (int(kind.value),) if isinstance(kind, Fixed) else ()

    def check(self, parameters: Mapping[str, object]) -> None:
        """Check a value for each parameter.

        Raises:
            SearchSpaceError: One is missing, unknown or out of bounds; all of it is said.
        """
        problems = Problems()
        admitted_values("", parameters, self.parameters, problems)
        problems.raise_if_any(SearchSpaceError)


def load_space(
    space: str | None,
    *,
    model_name: str,
    method: str,
    variant: str,
    parameters: tuple[str, ...],
    n_layers: int | None,
    optional: tuple[str, ...] = (),
) -> SearchSpace:
    """Read and check the search space of one method and variant.

    Args:
        space: A shipped name or a file; None takes the model's shipped file, else the default.
        model_name: Catalogue name of the model, or any other name.
        method: Which section of the file.
        variant: Which section of the method's.
        parameters: Names of the parameters that a trial sets.
        n_layers: Number of the model's decoder blocks; None where it is not known.
        optional: Names of settings that the space may search as well.

    Raises:
        SearchSpaceError: There is no such file, or something in it is wrong; all of it is said.
    """
    path = _find(space, model_name)
    content = read_yaml(path, error_class=SearchSpaceError)
    known = content.get(method)
    if space is None and not (isinstance(known, dict) and variant in known):
        # a model's file need not know every method and variant
        path = _find(DEFAULT, model_name)
        content = read_yaml(path, error_class=SearchSpaceError)
        if method not in content:  # it begins where another begins that searches the same
            for variants in content.values():
                if {*parameters} == {*variants.get(variant, {}).get("parameters", ())}:
                    content = {**content, method: variants}
                    break
    problems = Problems()
    sections = read_sections(content, n_layers, problems)
    section = choose_section(sections, method, variant, problems)
    found = resolve_section(
        section, f"{method}.{variant}", parameters, n_layers, problems, optional=optional
    )
    if problems.messages:
        raise SearchSpaceError(_one_message(path, problems.messages))
    by_depth = space is None and path.stem == DEFAULT and "layer" in parameters
    searched = (*parameters, *(name for name in optional if name in found.parameters))
    return SearchSpace(
        method=method,
        variant=variant,
        parameters={name: found.parameters[name] for name in searched},
        starting_points=tuple({name: point[name] for name in searched} for point in found.points),
        origin=f"default by depth ({n_layers} blocks)" if by_depth else str(path),
    )


def _find(space: str | None, model_name: str) -> Path:
    """Return the file that is meant; a shipped name wins over a file of that name."""
    shipped = shipped_spaces()
    if space is None:
        return search_spaces_dir() / f"{model_name if model_name in shipped else DEFAULT}.yaml"
    if space in shipped:
        return search_spaces_dir() / f"{space}.yaml"
    try:
        path = Path(space).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a home that does not exist
        raise SearchSpaceError(f"--space {space}: cannot be looked at ({error})") from error
    if exists:
        return path
    raise SearchSpaceError(
        f"--space {space}: neither a file nor a shipped name.{suggestion(space, shipped)}"
    )


def _one_message(path: Path, messages: list[str]) -> str:
    if len(messages) == 1:
        return f"{path}: {messages[0]}"
    return "\n  - ".join([f"{path}: {len(messages)} things are wrong:", *messages])
