"""RMU (arXiv 2403.03218): a block's outputs are steered to a random direction.

Differences from the paper: the coefficient counts in median norms of the outputs to forget
(Adaptive RMU, arXiv 2408.06223, scales by norms), so that one range serves all models; its own 6.5
is absolute. A median, since a prompt's first token may have a norm of quite another size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError
from lunar_tune.methods.contract import Fit, PreparedMethod, UnlearningTask
from lunar_tune.methods.gradient import TrainedMethod, gradient_fit
from lunar_tune.models.layout import check_layers, decoder_slice
from lunar_tune.training.adapting import Trained
from lunar_tune.training.answer_loss import Pair, padded_ids, reference_batches

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

BLOCKS = 3  # whose down-projections are trained: l and those below it, as in the paper


def rmu_loss(
    forget: Float[Tensor, "forget_tokens d_model"],
    control: Float[Tensor, " d_model"],
    retain: Float[Tensor, "retain_tokens d_model"],
    reference: Float[Tensor, "retain_tokens d_model"],
    *,
    alpha: float,
) -> Float[Tensor, ""]:
    """Return mean (x_f − control)² + α mean (x_r − ref_r)² over tokens and dimensions.

    x are a block's outputs; `control` is a random unit vector times a coefficient.
    Source: Li et al., arXiv 2403.03218, equations 1 and 2; they write sums over dimensions, their
    published code takes means, and α belongs to means.
    """
    moved = (forget.float() - control.float()).square().mean()
    return moved + alpha * (retain.float() - reference.float()).square().mean()


class RmuMethod(TrainedMethod):
    """RMU with its fixed settings."""

    name = "rmu"
    parameters = ("layer", "coefficient", "learning_rate")

    def prepare(self, task: UnlearningTask) -> PreparedRmu:
        """Check that there is what the loss needs; see the contract."""
        if not task.retain_pairs:
            raise InputError("--method rmu needs answers to keep: there are none.")
        return PreparedRmu(self, task)


class PreparedRmu(PreparedMethod):
    """Encoded pairs, and a block's outputs on them before unlearning."""

    def __init__(self, method: RmuMethod, task: UnlearningTask) -> None:
        self._method, self._task, self._loaded = method, task, task.loaded
        self._references: dict[int, tuple[list[Tensor], float]] = {}

    def unlearning(
        self, parameters: Mapping[str, Any], *, seed: int
    ) -> AbstractContextManager[Fit]:
        """Return a context in which the model is trained; see the contract."""
        import torch

        own, settings = self._method.resolved(parameters)
        layer = int(own["layer"])
        check_layers((layer,), self._loaded.n_layers)
        forget, retain = self._task.forget_pairs, self._task.retain_pairs
        references, norm = self._reference(layer)
        # A random direction with positive entries, as in the paper's code.
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(self._loaded.model.config.hidden_size, generator=generator)
        control = own["coefficient"] * norm * (drawn / drawn.norm()).to(self._loaded.device)

        def loss(_trained: Trained, batch: list[int], kept: list[int]) -> Tensor:
            return rmu_loss(
                self._outputs([forget[i] for i in batch], layer),
                control,
                self._outputs([retain[i] for i in kept], layer),
                torch.cat([references[i] for i in kept]).to(control.device),
                alpha=settings.steering_alpha,
            )

        blocks = range(max(0, layer - BLOCKS + 1), layer + 1)
        return gradient_fit(
            self._task,
            settings,
            loss,
            learning_rate=own["learning_rate"],
            seed=seed,
            modules=[self._loaded.layout.down_projection_name(block) for block in blocks],
        )

    def _reference(self, layer: int) -> tuple[list[Tensor], float]:
        """Return the base model's outputs of a block on each pair to keep, in host memory.

        And the median norm of its outputs on the pairs to forget. Of one block, the last asked for.
        """
        import torch

        if layer not in self._references:
            self._references.clear()
            with torch.no_grad():
                kept = [
                    output
                    for pairs in reference_batches(self._task.retain_pairs)
                    for output in self._outputs(pairs, layer).cpu().split([len(p) for p in pairs])
                ]
                norms = [
                    self._outputs(pairs, layer).float().norm(dim=1)
                    for pairs in reference_batches(self._task.forget_pairs)
                ]
            self._references[layer] = kept, float(torch.cat(norms).median())
        return self._references[layer]

    def _outputs(self, pairs: Sequence[Pair], layer: int) -> Float[Tensor, "tokens d_model"]:
        """Return block `layer`'s outputs at all tokens of questions and answers."""
        import torch

        ids = padded_ids(pairs, self._loaded.device)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(p) for p in pairs])[:, None]
        seen: list[Tensor] = []

        def hook(_module: Any, _args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        blocks = self._loaded.layout.blocks_of(self._loaded.model)
        handle = blocks[layer].register_forward_hook(hook)
        try:
            with decoder_slice(self._loaded.model, self._loaded.layout, 0, layer + 1) as decoder:
                decoder(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        return seen[-1][real.to(ids.device)]


ENTRIES = (RmuMethod,)
