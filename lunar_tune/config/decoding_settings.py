"""How answers are generated, apart from the generation so that reading options needs no torch.

Covers: token budget, repetition penalty, batch size.
Does not cover: which questions are asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lunar_tune.errors import InputError

__all__ = ["LEAST_BUDGET", "PUBLISHED_MAX_NEW_TOKENS", "DecodingSettings"]

PUBLISHED_MAX_NEW_TOKENS = 512  # config/forget.yaml of the published code at dfa56eb
LEAST_BUDGET = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingSettings:
    """How answers are generated."""

    max_new_tokens: int | None = PUBLISHED_MAX_NEW_TOKENS
    """Token budget of an answer; None is twice the longest true answer, and at least 32."""
    repetition_penalty: float = 1.0
    """1.0 is none, whatever the checkpoint's generation config says (Qwen ships 1.05)."""
    batch_size: int | None = None
    """Rows in a batch; None takes what suits the device."""

    def __post_init__(self) -> None:
        """Reject values that mean nothing."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.max_new_tokens}: at least 1.")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"--repetition-penalty {self.repetition_penalty}: a positive number.")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: at least 1.")
