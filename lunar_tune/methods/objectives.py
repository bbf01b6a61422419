"""The gradient methods by name: which loss each takes, of what.

Covers: gradient ascent (ga), gradient difference (gd), ascent with KL (ukl), DPO with refusals, NPO
and SimNPO.
Does not cover: the losses themselves (`losses`), what a step computes (`steps`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lunar_tune.methods import losses
from lunar_tune.methods.steps import Step

__all__ = ["OBJECTIVES", "Objective"]


def _ga(step: Step) -> Tensor:
    return losses.gradient_ascent(step.forget.tokens)


def _gd(step: Step) -> Tensor:
    return losses.gradient_difference(step.forget.tokens, step.retain.tokens)


def _ukl(step: Step) -> Tensor:
    kept = losses.kl_to_reference(step.reference_retain_logits, step.retain.logits)
    return losses.gradient_ascent(step.forget.tokens) + kept


def _dpo(step: Step) -> Tensor:
    return losses.dpo(
        step.refused.answers,
        step.forget.answers,
        step.reference_refused,
        step.reference_forget,
        beta=_beta(step, 0.1),
    )


def _npo(step: Step) -> Tensor:
    forgotten = losses.npo(step.forget.answers, step.reference_forget, beta=_beta(step, 0.1))
    return forgotten + _kept(step)


def _simnpo(step: Step) -> Tensor:
    forgotten = losses.simnpo(
        step.forget.answers,
        step.forget.lengths,
        beta=_beta(step, 2.5),
        gamma=step.settings.gamma,
    )
    return forgotten + _kept(step)


def _beta(step: Step, usual: float) -> float:
    return usual if step.settings.beta is None else step.settings.beta


def _kept(step: Step) -> Tensor | float:
    weight = step.settings.retain_weight
    return -weight * step.retain.tokens.mean() if weight else 0.0


@dataclass(frozen=True, slots=True)
class Objective:
    """A gradient method's loss."""

    summary: str
    loss: Callable[[Step], Tensor]
    keeps: bool = False
    """Whether it needs answers to keep."""
    refuses: bool = False
    """Whether it needs refusals."""


OBJECTIVES: Mapping[str, Objective] = {
    "ga": Objective("gradient ascent on the answers to forget", _ga),
    "gd": Objective("gradient difference: ascent, and descent on answers to keep", _gd, keeps=True),
    "ukl": Objective(
        "gradient ascent with KL to the original on answers to keep", _ukl, keeps=True
    ),
    "dpo": Objective(
        "direct preference optimisation of refusals over the answers", _dpo, refuses=True
    ),
    "npo": Objective("negative preference optimisation", _npo),
    "simnpo": Objective("negative preference optimisation without a reference", _simnpo),
}
