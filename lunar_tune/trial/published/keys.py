"""The published LUNAR code's configuration keys, typed, with `${key}` references resolved.

Covers: which keys decide something, their types and defaults, contradictions between them.
Does not cover: what they become here (`configuration`); Hydra's other powers (defaults lists,
overrides, resolvers such as `${oc.env:…}`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lunar_tune.errors import InputError, Problems
from lunar_tune.yaml_files import describe_mistakes, shown

__all__ = ["SWITCHED", "PublishedValues", "read_values"]

_REFERENCE = re.compile(r"\$\{([^{}$]*)\}")


class PublishedValues(BaseModel):
    """The keys that decide something, typed; the defaults are those of the published file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)

    model_family: str | None = None
    base_model_path: str | None = None
    model_path: str | None = None
    data_name: str
    forget_edge: Annotated[list[str], Field(min_length=1)]
    use_different_retain_dataset: bool = False
    different_retain_set_path: str | None = None
    layer_modified: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    coeff_list: Annotated[list[float], Field(min_length=1)]
    use_harmful: bool = False
    use_unverified: bool = False
    num_epochs: Annotated[int, Field(ge=1)] = 20
    lr: Annotated[float, Field(gt=0)]
    positions: int = -1
    eval_batch_size: Annotated[int, Field(ge=1)] | None = None
    eval_generation_max_new_tokens: Annotated[int, Field(ge=1)] = 512
    if_eval_factual: bool = False
    factual_data_path: str | None = None
    save_unlearned_model: bool = False
    save_unlearned_model_path: str | None = None


SWITCHED: Final = {
    "different_retain_set_path": "use_different_retain_dataset",
    "factual_data_path": "if_eval_factual",
    "save_unlearned_model_path": "save_unlearned_model",
}
"""Keys that count only where another one is true."""


def read_values(
    raw: Mapping[str, Any], problems: Problems
) -> tuple[PublishedValues, frozenset[str]]:
    """Return the typed values, and the keys that have none because something is wrong with them.

    Args:
        raw: The file's content.
        problems: Takes what is wrong.
    """
    resolved = _resolved(raw, problems)
    bad = {key for key in PublishedValues.model_fields if key in raw and key not in resolved}
    bad = {key for key in bad if resolved.get(SWITCHED.get(key, ""), True) is True}
    try:
        values = PublishedValues.model_validate(resolved)
    except ValidationError as error:
        for message in describe_mistakes(error, ()):
            # A key that stands in the file but did not resolve is not missing.
            if message.partition(":")[0] not in bad:
                problems.add(message)
        bad |= {str(mistake["loc"][0]) for mistake in error.errors()}
        good = {key: value for key, value in resolved.items() if key not in bad}
        values = PublishedValues.model_construct(**good)
    _check_together(values, bad, problems)
    return values, frozenset(bad)


def _check_together(values: PublishedValues, bad: set[str], problems: Problems) -> None:
    """Note contradictions between keys, as far as they could be read."""
    if not bad & {"layer_modified", "coeff_list"}:
        layers, coefficients = len(values.layer_modified), len(values.coeff_list)
        if layers != coefficients:
            problems.add(
                f"layer_modified has {layers} entries, coeff_list {coefficients}; give one "
                "coefficient for each layer"
            )
    for name in ("layer_modified", "forget_edge"):
        items: list[Any] = [] if name in bad else getattr(values, name)
        twice = sorted({str(item) for item in items if items.count(item) > 1})
        if twice:
            problems.add(f"{name}: names {', '.join(twice)} twice; once is enough")
    if not bad & {"use_harmful", "use_unverified"} and values.use_harmful == values.use_unverified:
        both = "both are true" if values.use_harmful else "neither is true"
        problems.add(f"use_harmful, use_unverified: {both}; set one of them to true")
    if values.positions != -1:
        problems.add(
            f"positions: is {values.positions}; directions are taken at the last prompt token, "
            "write -1"
        )
    for key, switch in SWITCHED.items():
        if key not in bad and getattr(values, switch) and not getattr(values, key):
            problems.add(f"{key}: is missing or empty, while {switch} is true")


def _resolved(raw: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """Return the keys that decide something, references replaced; note those that lead nowhere."""
    resolved: dict[str, Any] = {}
    # Switches first: what they switch off is not looked at.
    for key in sorted(PublishedValues.model_fields, key=SWITCHED.__contains__):
        if key in raw and resolved.get(SWITCHED.get(key, ""), key not in SWITCHED) is True:
            with problems.collect():
                resolved[key] = _resolve(raw, key, ())
    return resolved


def _resolve(raw: Mapping[str, Any], key: str, trail: tuple[str, ...]) -> Any:
    """Return a key's value with `${key}` references replaced."""
    if key in trail:
        circle = " → ".join([*trail[trail.index(key) :], key])
        raise InputError(f"{trail[0]}: the references go round in a circle ({circle}); break it")
    trail = (*trail, key)
    value = raw[key]
    if isinstance(value, list):
        return [_resolve_text(raw, item, trail) for item in value]
    return _resolve_text(raw, value, trail)


def _resolve_text(raw: Mapping[str, Any], value: Any, trail: tuple[str, ...]) -> Any:
    if not isinstance(value, str) or "${" not in value:
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole:
        return _referenced(raw, whole, trail)
    replaced = _REFERENCE.sub(lambda match: _joined(_referenced(raw, match, trail)), value)
    if "${" in replaced:
        raise InputError(
            f"{trail[0]}: {shown(value)} is no plain ${{key}} reference; write the value itself"
        )
    return replaced


def _referenced(raw: Mapping[str, Any], match: re.Match[str], trail: tuple[str, ...]) -> Any:
    key = match[1].strip()
    if key not in raw:
        raise InputError(
            f"{trail[0]}: {match[0]} refers to nothing in this file (only its own keys are looked "
            "up); write the value itself"
        )
    return _resolve(raw, key, trail)


def _joined(value: Any) -> str:
    """Return a referenced value as part of a text; a list of edges becomes A_B_C_D."""
    return "_".join(map(str, value)) if isinstance(value, list) else str(value)
