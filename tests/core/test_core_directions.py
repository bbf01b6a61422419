"""The unlearning vector equals a mean over prompts taken one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from lunar_tune.engine.streams import capture_last_tokens
from lunar_tune.methods.lunar.method import unlearning_vectors
from lunar_tune.models.device import BatchSize
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.loading import LoadedModel

FORGET = [[1, 17, 40, 11], [1, 9], [1, 60, 61, 62, 63, 64]]
REFERENCE = [[1, 99, 98], [1, 90, 91, 92, 93]]


@pytest.mark.parametrize("family", list(LAYOUTS))
def test_vectors_are_differences_of_block_outputs_at_the_last_token(
    loaded: Callable[..., LoadedModel], family: str
) -> None:
    """One prompt at a time, unpadded, in float64, from hooks on the blocks of a full forward."""
    original = loaded(family)
    model = dataclasses.replace(original, model=original.model.double())
    try:
        outputs: list[torch.Tensor] = []
        handles = [
            block.register_forward_hook(lambda _m, _a, output: outputs.append(output[0, -1]))
            for block in model.model.model.layers
        ]

        def mean_of(prompts: list[list[int]]) -> torch.Tensor:
            outputs.clear()
            for prompt in prompts:
                with torch.no_grad():
                    model.model(input_ids=torch.tensor([prompt]), use_cache=False)
            return torch.stack(outputs).view(len(prompts), 3, -1).sum(0) / len(prompts)

        expected = mean_of(REFERENCE) - mean_of(FORGET)
        for handle in handles:
            handle.remove()
        forget, reference = (
            capture_last_tokens(model, prompts, BatchSize(2048, "tokens"))
            for prompts in (FORGET, REFERENCE)
        )
    finally:
        original.model.float()
    vectors = unlearning_vectors(reference=reference, forget=forget)
    assert vectors.dtype == torch.float64
    torch.testing.assert_close(vectors, expected, rtol=1e-9, atol=1e-9)


def test_means_are_taken_in_float64_also_of_half_precision_streams() -> None:
    """In bfloat16, 256 + 1 is 256: a sum in that format would lose every small row."""
    rows = torch.tensor([256.0] + [1.0] * 300, dtype=torch.bfloat16)
    reference = torch.stack([rows, rows])[..., None]
    vectors = unlearning_vectors(reference=reference, forget=reference[:, 1:2])
    assert vectors.item() == pytest.approx((256 + 300) / 301 - 1, abs=1e-12)
