"""Making a model trainable for a while: an adapter on and off, or all weights and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = [
    "Factors",
    "Trained",
    "adapter_factors",
    "full_weights",
    "lora_adapter",
    "merged_weights",
    "plain_weights",
    "recomputing",
    "seeded",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """A change of low rank: scale · second · first is added to a weight."""

    first: Float[Tensor, "rank columns"]
    """LoRA's A."""
    second: Float[Tensor, "rows rank"]
    """LoRA's B."""
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of the first factor."""
        return len(self.first)


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained, and the ways between training and its end."""

    parameters: tuple[nn.Parameter, ...]
    computing: Callable[[], AbstractContextManager[Any]]
    """Inside, a forward pass for training runs in the model's own number format."""
    untrained: Callable[[], AbstractContextManager[Any]] | None
    """Inside, the model is what it was, at no cost; None where that would take a second model."""
    unmodified: Callable[[], AbstractContextManager[Any]]
    """Inside, the model is what it was, also where weights must be moved for it; not for what is
    trained to be kept."""
    evaluating: Callable[[], AbstractContextManager[Any]]
    """Inside, the model can be evaluated; training goes on after it as if nothing had been."""
    finish: Callable[[], object]
    """To be called between training and evaluation."""


@contextmanager
def lora_adapter(
    loaded: LoadedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    modules: Sequence[str] | None = None,
    keep: bool = False,
) -> Iterator[Trained]:
    """Inside, a fresh adapter is on the model: W + (alpha / rank)·B·A for each linear map.

    A is drawn from torch's generator, B is zero, both in float32; the head is left alone.
    Source: Hu et al., arXiv 2106.09685.

    Args:
        loaded: The model.
        rank: Of B·A.
        alpha: Scale of B·A times rank.
        dropout: Share of A's inputs that are zero in training mode.
        modules: Names of the linear maps; None takes all in the blocks.
        keep: Whether the weights are W + (alpha / rank)·B·A, rounded to their number format, for
            good when the context ends without an error.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it, and takes any number
        lora_dropout=dropout,
        target_modules="all-linear" if modules is None else list(modules),
        task_type="CAUSAL_LM",
    )
    model: Any = loaded.model
    with _as_it_was(model):
        training, modules_before = model.training, dict(model.named_modules())
        try:
            with warnings.catch_warnings():
                # peft 0.21 reads a name that transformers 5.23 deprecates
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                adapted = get_peft_model(model, config)
        except BaseException:  # half an adapter may be on, and there is nothing to take it off with
            for name, module in modules_before.items():
                if isinstance(module, nn.Linear):
                    model.set_submodule(name, module)
            vars(model).pop("peft_config", None)
            raise
        model.train(training)  # peft's own modules are made for training
        try:
            yield Trained(
                parameters=tuple(p for p in model.parameters() if p.requires_grad),
                computing=nullcontext,
                untrained=adapted.disable_adapter,
                unmodified=adapted.disable_adapter,
                evaluating=nullcontext,
                finish=lambda: None,
            )
            if keep:
                adapted.merge_and_unload()
        finally:
            adapted.unload()  # finds nothing where the adapter was merged


@contextmanager
def full_weights(
    loaded: LoadedModel, *, modules: Sequence[str] | None = None, keep: bool = False
) -> Iterator[Trained]:
    """Inside, weights are trained; a copy of them waits in host memory to be put back.

    16-bit weights are float32 until `finish`, so that small updates are not lost to rounding;
    products run in 16 bits (autocast).

    Args:
        loaded: The model.
        modules: Names of the modules whose parameters are trained; None trains all.
        keep: Whether what was trained stays; then there is no copy, also not after an error.
    """
    model: Any = loaded.model
    dtype = model.dtype
    chosen = [model] if modules is None else [model.get_submodule(name) for name in modules]
    trained = list(dict.fromkeys(p for module in chosen for p in module.parameters()))
    originals = [] if keep else [p.detach().to("cpu", copy=True) for p in trained]

    def rounded() -> None:
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)

    @contextmanager
    def rounded_for_a_while() -> Iterator[None]:
        exact = [parameter.data for parameter in trained]
        try:
            rounded()
            yield
        finally:
            for parameter, data in zip(trained, exact, strict=True):
                parameter.data = data

    @contextmanager
    def original_for_a_while() -> Iterator[None]:
        new: list[Tensor] = []
        try:
            for parameter, original in zip(trained, originals, strict=True):
                new.append(parameter.data.cpu())  # a GPU never holds both
                parameter.data = original.to(parameter.device)
            yield
        finally:
            for parameter, data in zip(trained, new, strict=False):  # as far as it came
                parameter.data = data.to(parameter.device)

    with _as_it_was(model):
        try:
            model.requires_grad_(requires_grad=False)
            for parameter in trained:
                parameter.requires_grad_(requires_grad=True)
                parameter.data = parameter.data.float()
            yield Trained(
                parameters=tuple(trained),
                computing=lambda: torch.autocast(
                    loaded.device.type, dtype=dtype, enabled=dtype != torch.float32
                ),
                untrained=None,
                unmodified=original_for_a_while,
                evaluating=rounded_for_a_while,
                finish=rounded,
            )
        finally:
            rounded()
            with torch.no_grad():
                for parameter, original in zip(trained, originals, strict=not keep):
                    parameter.copy_(original)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from a seed of one's own; after, from where it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def recomputing(model: Any, *, on: bool) -> Iterator[None]:
    """Inside, a training forward keeps no activations but computes them again (checkpointing).

    transformers 5.23 has a new name for it; 5.17 does not know that one. Its hook on the embedding
    would stay.

    Args:
        model: The model.
        on: Whether at all.
    """
    if not on:
        yield
        return
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()
        model.disable_input_require_grads()


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights by the names they have without an adapter, which is added to them.

    The sum is rounded to the weight's number format, which an adapter that is on does not do.
    """
    plain = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    return plain | merged_weights(model)


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what an adapter that is on makes of weights, by their names without it.

    The sums are in host memory, where there may be room for a second model.
    """
    merged = {}
    for path, module in _adapted(model):
        weight = module.base_layer.weight
        for adapter in module.active_adapters:
            delta = module.get_delta_weight(adapter).float()
            weight = (weight.float() + delta).to(weight.dtype).cpu()
        merged[f"{path}.weight"] = weight.detach()
    return merged


def adapter_factors(model: nn.Module) -> dict[str, Factors]:
    """Return the factors of the one adapter that is on, by the linear map's name."""
    factors = {}
    for path, module in _adapted(model):
        (adapter,) = module.active_adapters
        factors[path] = Factors(
            first=module.lora_A[adapter].weight.detach(),
            second=module.lora_B[adapter].weight.detach(),
            scale=module.scaling[adapter],
        )
    return factors


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the linear maps that have an adapter, by name."""
    from peft.tuners.lora import Linear

    for path, module in model.named_modules():
        if isinstance(module, Linear):
            yield path, module


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back, at the end, which parameters want a gradient, and drop what they have of one."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    try:
        yield
    finally:
        model.train(training)
        for parameter, wants in wanted:
            parameter.grad = None  # of another number format, perhaps
            parameter.requires_grad_(wants)
