"""What a trial costs at least on a device: operations over its peak, bytes over its bandwidth.

Covers: measuring both peaks on the spot, counting what a trial needs.
Does not cover: launch times, attention's own operations (a few percent at these lengths).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lunar_tune.trial.worker import Worker

__all__ = ["DevicePeaks", "Floor", "measure_device", "trial_floor"]

SIDE = 8192  # of the square matrices that are multiplied
COPIED = 2**31  # bytes that are copied
TRIES = 10
# AdamW reads matrix, gradient and two averages, and writes matrix and averages; the gradient is
# written once and the matrix read once more by the forward product.
ADAMW_PASSES = 9


@dataclass(frozen=True, slots=True)
class DevicePeaks:
    """What the device did at best."""

    operations: float
    """Per second, in the model's number format."""
    fit_operations: float
    """Per second, float32 with tensor cores (TF32)."""
    bytes: float
    """Per second, read and written."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The least seconds of a trial's parts."""

    fit: float
    prompts: float
    decoding: float

    @property
    def seconds(self) -> float:
        """Of the trial."""
        return self.fit + self.prompts + self.decoding

    def describe(self) -> str:
        """Return the parts in words."""
        return f"fit {self.fit:.2f}, prompts {self.prompts:.2f}, decoding {self.decoding:.2f}"


def measure_device(dtype: torch.dtype) -> DevicePeaks:
    """Measure the current CUDA device."""
    a = torch.randn(SIDE, SIDE, device="cuda", dtype=dtype)
    flops = 2 * SIDE**3
    operations = flops / _fastest(lambda: a @ a)
    b = a.float()
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    fit_operations = flops / _fastest(lambda: b @ b)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    moved = 2 * COPIED / _fastest(lambda: target.copy_(source))
    return DevicePeaks(operations, fit_operations, moved)


def trial_floor(
    peaks: DevicePeaks, worker: Worker, layer: int, solver: str, new_tokens: int
) -> Floor:
    """Count a trial with every row decoded to its budget, token by token.

    Args:
        peaks: Of the device.
        worker: Knows model and prompts.
        layer: The edited block.
        solver: adamw or closed_form.
        new_tokens: Of every row.
    """
    loaded, tree = worker.loaded, worker.activations.tree
    model = loaded.model
    projection = loaded.layout.down_projection_of(model, layer).weight
    embeddings = torch.as_tensor(model.get_input_embeddings().weight)
    total = loaded.model.num_parameters() - embeddings.numel()
    blocks = loaded.layout.blocks_of(model)
    block = sum(parameter.numel() for parameter in blocks[0].parameters())
    above = (loaded.n_layers - layer - 1) * block + projection.numel()
    prompts = {node for row in range(tree.n_rows) for node in _prompt(worker, row)}
    rows = tree.n_rows
    step = max(2 * total * rows / peaks.operations, total * model.dtype.itemsize / peaks.bytes)
    fit = 0.0
    if solver == "adamw":
        settings = worker.spec.method.settings
        data = worker.spec.data
        questions = [record.question for record in (*data.fit_forget, *data.fit_retain)]
        tokens = sum(map(len, worker.encoder.prompts(questions)))
        steps = settings.epochs * -(-tokens // settings.batch_size)
        fit = settings.epochs * 4 * tokens * projection.numel() / peaks.fit_operations
        fit += steps * ADAMW_PASSES * 4 * projection.numel() / peaks.bytes
    return Floor(
        fit=fit,
        prompts=2 * above * len(prompts) / peaks.operations,
        decoding=new_tokens * step,
    )


def _prompt(worker: Worker, row: int) -> list[int]:
    activations = worker.activations
    length = activations.prompt_lengths[row]
    nodes: list[int] = activations.tree.nodes_of([row], [length]).tolist()
    return nodes


def _fastest(work: Callable[[], object]) -> float:
    """Return the least seconds of some tries."""
    seconds = []
    for _ in range(TRIES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
