"""A change of weights as a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lunar_tune.training.adapting import Factors

__all__ = ["LARGEST_ERROR", "LARGEST_RANK", "nearest_factors", "relative_error", "write_adapter"]

LARGEST_ERROR = 0.01
"""Relative Frobenius error up to which a product counts as the difference itself."""
LARGEST_RANK = 512
"""Largest rank that is chosen here: a seventh of a 7B model's d_model."""


def nearest_factors(
    change: Float[Tensor, "rows columns"], *, rank: int | None = None
) -> tuple[Factors, float]:
    """Return the product that is nearest to a matrix, and its relative Frobenius error.

    That is the truncated singular value decomposition (Eckart and Young). Its left vectors are the
    eigenvectors of the matrix times its transpose, which has d_model rows instead of d_ff columns.
    In float64.

    Args:
        change: The matrix.
        rank: Of the product; None takes the smallest whose error is at most `LARGEST_ERROR`, and at
            most `LARGEST_RANK`.
    """
    matrix = change.double()
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    if rank is None:
        left = squares.sum() - squares.cumsum(0)
        near = (left <= LARGEST_ERROR**2 * squares.sum()).nonzero()
        rank = min(int(near[0]) + 1 if len(near) else len(squares), LARGEST_RANK)
    chosen = vectors[:, :rank]
    factors = Factors(first=(chosen.T @ matrix).float(), second=chosen.float())
    return factors, relative_error(factors, change)


def relative_error(factors: Factors, change: Float[Tensor, "rows columns"]) -> float:
    """Return the Frobenius norm of what a product lacks of a matrix, relative to the matrix."""
    matrix = change.double()
    product = factors.scale * factors.second.double() @ factors.first.double()
    size = float(matrix.norm())
    return float((matrix - product).norm()) / size if size else 0.0


def write_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    *,
    base: str,
    revision: str | None,
) -> None:
    """Write factors as an adapter of the maps that they belong to, in float32.

    Args:
        folder: Where to.
        factors: By the linear map's name.
        base: Hub id or folder of the model that it belongs on.
        revision: Of the hub's repository.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    ranks = {name: one.rank for name, one in factors.items()}
    alphas = {name: _plain(one.scale * one.rank) for name, one in factors.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    options: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(factors),
        "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
    }
    LoraConfig(**options).save_pretrained(str(folder))
    tensors = {}
    for name, one in factors.items():
        for part, factor in (("A", one.first), ("B", one.second)):
            key = f"base_model.model.{name}.lora_{part}.weight"
            tensors[key] = factor.detach().float().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _plain(number: float) -> float:
    """Return a whole number as one."""
    return int(number) if float(number).is_integer() else number
