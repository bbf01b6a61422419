"""Gradient methods: losses of answers (ascent, DPO, NPO, SimNPO) and of activations (RMU)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lunar_tune.errors import InputError
from lunar_tune.methods.contract import Fit, PreparedMethod, UnlearningTask
from lunar_tune.methods.gradient import GradientMethod, Step, TrainedMethod, gradient_fit
from lunar_tune.models.layout import check_layers, decoder_slice
from lunar_tune.training.answer_loss import Pair, padded_ids, reference_batches

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Answers = Float[Tensor, " answers"]

BETA = 0.1
SIMNPO_BETA = 2.5  # it multiplies a mean over tokens, and 0.1 would hardly ever count less
RMU_BLOCKS = 3  # whose down-projections are trained: l and those below it, as in the paper


class GradientAscent(GradientMethod):
    """The negative of the usual loss, which has no lower bound: training has to stop in time.

    Source: Jang et al., arXiv 2210.01504; TOFU, arXiv 2401.06121, section 3.3.
    """

    name = "ga"

    def loss(self, step: Step) -> Tensor:
        """Return the mean log π of the tokens to forget."""
        return step.answers("forget").tokens.mean()


class GradientDifference(GradientMethod):
    """Ascent and the usual loss on answers to keep, with equal weights as in TOFU, section 3.3.

    Source: Liu et al., arXiv 2203.12817.
    """

    name = "gd"
    keeps = True

    def loss(self, step: Step) -> Tensor:
        """Return the ascent and the usual loss."""
        return step.answers("forget").tokens.mean() - step.answers("retain").tokens.mean()


class KlAscent(GradientMethod):
    """Ascent and KL to the base model on answers to keep ("KL minimization" in TOFU, 3.3)."""

    name = "ukl"
    keeps = True
    references = ("retain",)

    def loss(self, step: Step) -> Tensor:
        """Return the ascent, and the mean over tokens of KL(base model ‖ model)."""
        from torch.nn.functional import log_softmax

        expected = log_softmax(step.reference("retain").float(), dim=-1)
        said = log_softmax(step.answers("retain").logits.float(), dim=-1)
        kept = (expected.exp() * (expected - said)).sum(-1).mean()
        return step.answers("forget").tokens.mean() + kept


def dpo(
    preferred: Answers,
    rejected: Answers,
    reference_preferred: Answers,
    reference_rejected: Answers,
    *,
    beta: float,
) -> Float[Tensor, ""]:
    """Return −mean log σ(β[(log π_p − log ref_p) − (log π_r − log ref_r)]).

    Source: Rafailov et al., arXiv 2305.18290, equation 7; for unlearning TOFU, arXiv 2401.06121,
    section 3.3: preferred are refusals, rejected the true answers.
    """
    from torch.nn.functional import logsigmoid

    margin = (preferred - reference_preferred) - (rejected - reference_rejected)
    return -logsigmoid(beta * margin).mean()


def npo(forget: Answers, reference: Answers, *, beta: float) -> Float[Tensor, ""]:
    """Return −(2/β) mean log σ(−β(log π − log ref)): DPO without a preferred answer.

    Its gradient is gradient ascent's (on sums over answers) where π equals the reference, and
    vanishes as an answer becomes unlikely.
    Source: Zhang et al., arXiv 2404.05868, equation 3.
    """
    from torch.nn.functional import logsigmoid

    return -2 / beta * logsigmoid(-beta * (forget - reference)).mean()


def simnpo(forget: Answers, lengths: Answers, *, beta: float, gamma: float) -> Float[Tensor, ""]:
    """Return −(2/β) mean log σ(−β log π / length − γ): NPO without a reference.

    Source: Fan et al., arXiv 2410.07163; lengths are in tokens, γ is the margin.
    """
    from torch.nn.functional import logsigmoid

    return -2 / beta * logsigmoid(-beta * forget / lengths - gamma).mean()


class Preference(GradientMethod):
    """DPO of refusals to the true answers."""

    name = "dpo"
    references = ("refused", "forget")

    def loss(self, step: Step) -> Tensor:
        """Return the loss of both answers to each question."""
        now = [step.answers(name).answers for name in self.references]
        before = [step.reference(name) for name in self.references]
        return dpo(*now, *before, beta=step.settings.beta or BETA)


class NegativePreference(GradientMethod):
    """NPO, with the usual loss on answers to keep if it has a weight."""

    name = "npo"
    weighs_retain = True
    references = ("forget",)

    def loss(self, step: Step) -> Tensor:
        """Return the loss, and that of answers to keep."""
        beta, said = step.settings.beta or BETA, step.answers("forget").answers
        return npo(said, step.reference("forget"), beta=beta) + step.kept_loss


class SimplePreference(GradientMethod):
    """SimNPO, with the usual loss on answers to keep if it has a weight."""

    name = "simnpo"
    weighs_retain = True

    def loss(self, step: Step) -> Tensor:
        """Return the loss, and that of answers to keep."""
        said, fixed = step.answers("forget"), step.settings
        beta, gamma = fixed.beta or SIMNPO_BETA, fixed.gamma
        return simnpo(said.answers, said.lengths, beta=beta, gamma=gamma) + step.kept_loss


class RmuMethod(TrainedMethod):
    """RMU: a block's outputs are steered to a random direction.

    Source: Li et al., arXiv 2403.03218. Differs in that the coefficient counts in median norms of
    the outputs to forget (Adaptive RMU, arXiv 2408.06223, scales by norms), so that one range
    serves all models; the paper's 6.5 is absolute. A median, since a prompt's first token may have
    a norm of quite another size.
    """

    name = "rmu"
    parameters = ("layer", "coefficient", "learning_rate")

    def sees_retain(self, parameters: Mapping[str, Any]) -> bool:
        """Say whether keeping activations has a weight."""
        return self.resolved(parameters)[1].steering_alpha > 0

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
        control: Tensor = own["coefficient"] * norm * (drawn / drawn.norm()).to(self._loaded.device)

        def loss(_fit: Fit, batch: list[int], kept: list[int]) -> Tensor:
            """Return mean (x_f − control)² + α mean (x_r − ref_r)² over tokens and dimensions.

            x are the block's outputs (equations 1 and 2). The paper writes sums over dimensions,
            its code takes means, and α belongs to means.
            """
            moved = self._outputs([forget[i] for i in batch], layer).float() - control
            now = self._outputs([retain[i] for i in kept], layer).float()
            before = torch.cat([references[i] for i in kept]).to(control.device).float()
            stayed = (now - before).square().mean() * settings.steering_alpha
            return moved.square().mean() + stayed

        blocks = range(max(0, layer - RMU_BLOCKS + 1), layer + 1)
        maps = [self._loaded.layout.down_projection_name(block) for block in blocks]
        rate = own["learning_rate"]
        return gradient_fit(self._task, settings, loss, learning_rate=rate, seed=seed, modules=maps)

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

        block = self._loaded.layout.blocks_of(self._loaded.model)[layer]
        with (
            block.register_forward_hook(hook),
            decoder_slice(self._loaded.model, self._loaded.layout, 0, layer + 1) as decoder,
        ):
            decoder(input_ids=ids, use_cache=False)
        return seen[-1][real.to(ids.device)]


ENTRIES = (
    GradientAscent,
    GradientDifference,
    KlAscent,
    Preference,
    NegativePreference,
    SimplePreference,
    RmuMethod,
)
