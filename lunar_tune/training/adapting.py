"""Making a model trainable for a while, by an adapter or in all weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lunar_tune.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor, nn

    from lunar_tune.models.loading import LoadedModel


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What training or another edit has changed in a model, to be read before it is taken back."""

    weights: Callable[[], Mapping[str, Tensor]]
    """Gives the new value of every parameter that may have changed, in the model's number format,
    by its name in a saved checkpoint. A tensor may be the model's own: copy what is to outlive the
    edit."""
    factors: Callable[[], Mapping[str, Factors]] | None = None
    """Gives what was added to weights as products of low rank, by the linear map's name; None where
    it is none. A name with `.weight` behind it is one of `weights`."""
    merged: bool = False
    """Whether the model computes with an adapter beside its weights now, so that a model with
    `weights` answers with another rounding."""


_Context = Callable[[], AbstractContextManager[Any]]


@dataclass(slots=True, kw_only=True)
class Fit:
    """A fit under way: whoever holds it drives it epoch by epoch and may end it early."""

    base_model: _Context
    """Inside, the model is the base model again; after, what the fit had made of it; both bit for
    bit, and as often as is wanted. Not for what is trained to be kept."""
    edit: Edit
    losses: tuple[float, ...] = ()
    """Training loss of each epoch so far; all of a fit that has no epochs to watch, one value for a
    closed form."""
    epochs: Iterable[float] = ()
    """Trains an epoch for each loss that it yields, and leaves the model to be evaluated."""
    n_epochs: int = 0
    computing: _Context = nullcontext
    """Inside, a forward pass for training runs in the model's own number format."""
    evaluating: _Context = nullcontext
    """Inside, the model may be evaluated between two epochs."""
    finish: Callable[[], object] = lambda: None
    """Ends the fit where it is: the model is then unlearned. To be called once."""
    edited_layer: int | None = None
    """The block whose down-projection is changed, with nothing changed below it and nothing else in
    it, so that an evaluation need not compute again what lies below. None promises nothing."""

    def __iter__(self) -> Iterator[int]:
        """Train; yield the number of epochs done after each."""
        for loss in self.epochs:
            self.losses = (*self.losses, loss)
            yield len(self.losses)


@contextmanager
def trainable(
    loaded: LoadedModel,
    settings: TrainingSettings,
    *,
    seed: int,
    modules: Sequence[str] | None = None,
    keep: bool = False,
) -> Iterator[Fit]:
    """Inside, an adapter or weights can be trained, as the settings say.

    `seed` is torch's inside the block; its state comes back after. `modules` names what is trained;
    None trains all linear maps of the blocks, or all. With `keep` what was trained stays.
    """
    make = _full_weights if settings.trained == "full" else partial(_lora_adapter, settings)
    with (
        seeded(seed, loaded.device),
        _as_it_was(loaded.model),
        make(loaded, modules, keep=keep) as fit,
        _recomputing(loaded.model) if settings.checkpointing else nullcontext(),
    ):
        yield fit


@contextmanager
def _lora_adapter(
    settings: TrainingSettings, loaded: LoadedModel, modules: Sequence[str] | None, *, keep: bool
) -> Iterator[Fit]:
    """Inside, a fresh adapter is on the model: W + (alpha / rank)·B·A for each linear map.

    A is drawn from torch's generator, B is zero, both in float32. With `keep` the sum, rounded to
    the weights' number format, stays when the context ends without an error.
    Source: Hu et al., arXiv 2106.09685.
    """
    from peft import LoraConfig, get_peft_model
    from torch import nn

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides it, and takes any number
        lora_dropout=settings.dropout,
        target_modules="all-linear" if modules is None else list(modules),
        task_type="CAUSAL_LM",
    )
    model: Any = loaded.model
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
        weights, factors = partial(merged_weights, model), partial(_factors, model)
        edit = Edit(weights=weights, factors=factors, merged=True)
        yield Fit(base_model=adapted.disable_adapter, edit=edit)
        if keep:
            adapted.merge_and_unload()
    finally:
        adapted.unload()  # finds nothing where the adapter was merged


@contextmanager
def _full_weights(
    loaded: LoadedModel, modules: Sequence[str] | None, *, keep: bool
) -> Iterator[Fit]:
    """Inside, weights are trained; a copy of them waits in host memory to be put back.

    16-bit weights are float32 until `finish`, so that small updates are not lost to rounding;
    products run in 16 bits (autocast). With `keep` what was trained stays, also after an error, and
    there is no copy.
    """
    import torch

    model: Any = loaded.model
    dtype = model.dtype
    chosen = [model] if modules is None else [model.get_submodule(name) for name in modules]
    trained = tuple(dict.fromkeys(p for module in chosen for p in module.parameters()))
    originals = [] if keep else [p.detach().to("cpu", copy=True) for p in trained]

    def round_all() -> None:
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)

    def weights() -> dict[str, Tensor]:
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    mixed = partial(torch.autocast, loaded.device.type, dtype=dtype, enabled=dtype != torch.float32)
    try:
        model.requires_grad_(requires_grad=False)
        for parameter in trained:
            parameter.requires_grad_(requires_grad=True)
            parameter.data = parameter.data.float()
        yield Fit(
            base_model=lambda: holding(trained, originals, on_host=True),
            edit=Edit(weights=weights),
            computing=mixed,
            evaluating=lambda: holding(trained, (p.data.to(dtype) for p in trained)),
            finish=round_all,
        )
    finally:
        round_all()
        with torch.no_grad():
            for parameter, original in zip(trained, originals, strict=not keep):
                parameter.copy_(original)


@contextmanager
def holding(
    parameters: Sequence[Tensor], values: Iterable[Tensor], *, on_host: bool = False
) -> Iterator[None]:
    """Inside, parameters hold other values; theirs wait, in host memory if a GPU holds one only."""
    waiting: list[Tensor] = []
    try:
        for parameter, value in zip(parameters, values, strict=True):
            waiting.append(parameter.data.cpu() if on_host else parameter.data)
            parameter.data = value.to(parameter.device)
        yield
    finally:
        for parameter, data in zip(parameters, waiting, strict=False):  # as far as it came
            parameter.data = data.to(parameter.device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch inside the block and restores its state after."""
    import torch

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    """Inside, activations are computed again in the backward pass (checkpointing).

    transformers 5.23 has a new name for it; 5.17 does not know that one. Its hook on the embedding
    would stay.
    """
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()
        model.disable_input_require_grads()


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what the adapter that is on makes of weights, by their names without it.

    The sums are in host memory, where there may be room for a second model.
    """
    merged = {}
    for path, module, adapter in _adapted(model):
        weight = module.base_layer.weight
        delta = module.get_delta_weight(adapter).float()
        merged[f"{path}.weight"] = (weight.float() + delta).to(weight.dtype).cpu().detach()
    return merged


def _factors(model: nn.Module) -> dict[str, Factors]:
    """Return the factors of the adapter that is on, by the linear map's name."""
    return {
        path: Factors(
            first=module.lora_A[adapter].weight.detach(),
            second=module.lora_B[adapter].weight.detach(),
            scale=module.scaling[adapter],
        )
        for path, module, adapter in _adapted(model)
    }


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Yield each linear map that has an adapter, its name before it and the adapter's behind."""
    from peft.tuners.lora import Linear

    for path, module in model.named_modules():
        if isinstance(module, Linear):
            (adapter,) = module.active_adapters
            yield path, module, adapter


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back, at the end, the mode and which parameters want a gradient; drop gradients."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    try:
        yield
    finally:
        model.train(training)
        for parameter, wants in wanted:
            parameter.grad = None  # of another number format, perhaps
            parameter.requires_grad_(wants)
