"""LUNAR (arXiv 2502.07218) as a method of the registry; `method` does its work, with torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError, Problems
from lunar_tune.methods.contract import Method, UnlearningTask, number_of
from lunar_tune.training import CheckedSettings, setting, with_settings

if TYPE_CHECKING:
    from lunar_tune.methods.lunar.method import PreparedLunar

SOLVERS = ("adamw", "closed_form", "lora")
# Settings that a solver does not look at.
UNUSED = {
    "adamw": frozenset({"rank"}),
    "closed_form": frozenset({"rank", "epochs", "batch_size", "master_dtype", "weight_decay"}),
    "lora": frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class LunarSettings(CheckedSettings):
    """What is fixed over a search; a space may search the numbers among it."""

    solver: str = setting("adamw", choices=SOLVERS)
    """adamw (as published), closed_form (ridge regression) or lora (a product of low rank)."""
    positions: str = setting("all", choices=("all", "last"))
    """Which tokens of a forget prompt are moved: all (as published) or only the last. Tokens that
    are not moved are kept where they are."""
    retain_points: float | None = setting(None, above=0)
    """Retain tokens in the fit, drawn at random, for each forget token (the paper takes as many,
    1.0); none takes all of them, as the published code does."""
    rank: int = setting(8, least=1)
    """Rank of lora's product; 8 as published."""
    epochs: int = setting(20, least=1)
    """Passes of adamw and lora over all tokens; as published."""
    batch_size: int = setting(64, least=1)
    """Tokens in a step of theirs; 64 as published."""
    master_dtype: str = setting("float32", choices=("float32", "bfloat16"))
    """Number format of the trained matrix: float32, or bfloat16 as published."""
    weight_decay: float | None = setting(None, least=0)
    """Decoupled weight decay; none means 0 for float32, torch's 0.01 for bfloat16 as published. In
    float32 the difference from W₀ is trained: decay pulls towards the original matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver == "lora" and self.master_dtype != "float32":
            raise InputError("master_dtype: lora trains in float32.")

    @property
    def decay(self) -> float:
        """The weight decay in force."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.0 if self.master_dtype == "float32" else 0.01


class LunarMethod(Method):
    """LUNAR with its fixed settings.

    A trial sets layer and coefficient, a list each for several layers, and the solver's own
    parameter: ridge or learning rate.
    """

    name = "lunar"
    settings_type = LunarSettings
    variant_setting = "solver"
    variants = SOLVERS
    edits_one_layer = True  # the lowest of them: nothing else changes there and below
    along_vectors = True
    settings: LunarSettings

    def __init__(self, settings: LunarSettings) -> None:
        super().__init__(settings)
        self.unused = UNUSED[settings.solver]
        own = "ridge" if settings.solver == "closed_form" else "learning_rate"
        self.parameters = ("layer", "coefficient", own)
        # AdamW trains a whole matrix; the others add a product.
        self.adapter = "approximate" if settings.solver == "adamw" else "exact"

    def check_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Check names and values; whether the model has the layers is checked with the model."""
        self.resolved(parameters)

    def resolved(
        self, parameters: Mapping[str, Any]
    ) -> tuple[dict[int, float], float, LunarSettings]:
        """Return the coefficient of each layer, ridge or learning rate, and a trial's settings."""
        super().check_parameters(parameters)
        problems, own = Problems(), self.parameters[-1]
        with problems.collect():
            coefficients = _coefficients(parameters)
        with problems.collect():
            number = number_of(own, parameters[own], positive=True)
        with problems.collect():
            settings = with_settings(self.settings, parameters)
        problems.raise_if_any()
        return coefficients, number, settings

    def prepare(self, task: UnlearningTask) -> PreparedLunar:
        """Take the unlearning vectors."""
        from lunar_tune.methods.lunar.method import PreparedLunar

        return PreparedLunar(self.resolved, task)


def _coefficients(parameters: Mapping[str, Any]) -> dict[int, float]:
    """Return a coefficient for each layer of one or several; one may be given for all."""

    def numbers(name: str) -> list[float]:
        value = parameters[name]
        values = value if isinstance(value, list | tuple) else [value]
        return [number_of(name, one) for one in values]

    layers, coefficients = numbers("layer"), numbers("coefficient")
    if not layers:
        raise InputError("layer: an empty list. Give at least one layer.")
    if len(coefficients) == 1:
        coefficients *= len(layers)
    if len(layers) != len(coefficients):
        raise InputError(
            f"{len(layers)} layers and {len(coefficients)} coefficients: give one coefficient for "
            "each layer, or one for all."
        )
    if not all(layer.is_integer() for layer in layers):
        raise InputError(f"layer {parameters['layer']}: whole numbers.")
    chosen = [int(layer) for layer in layers]
    if len(set(chosen)) < len(chosen):
        raise InputError(f"layer {', '.join(map(str, chosen))}: a layer is named twice.")
    return dict(zip(chosen, coefficients, strict=True))


ENTRIES = (LunarMethod,)
