"""Embeddings of texts, for how alike in meaning two answers are.

Shapes: `texts` counts the texts of a call, `d` is the embedder's width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lunar_tune.engine.prefixes import PrefixTree
from lunar_tune.engine.streams import capture_streams, sweep_batch
from lunar_tune.errors import ModelError
from lunar_tune.models.device import DeviceMemory, resolve_device
from lunar_tune.models.loading import hub_resolves
from lunar_tune.paths import is_folder

if TYPE_CHECKING:
    from lunar_tune.models.loading import LoadedModel

__all__ = [
    "Embedder",
    "SentenceEmbedder",
    "StateEmbedder",
    "check_embedding_model",
    "load_sentence_embedder",
]

# Texts in a forward of a sentence-embedding model; such models are small.
TEXTS_PER_BATCH = 64


class Embedder(ABC):
    """Texts to vectors of length one, so that a product of two is their cosine similarity."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What is shown and written beside a similarity, which is worth nothing without it."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers in an embedding."""

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        """Return each text's embedding, in float64 and host memory.

        White space around a text is left out. A text of nothing else, such as the answer of a model
        that ends at once, has no direction: its embedding is zero, and so is its similarity to all.
        """
        stripped = [text.strip() for text in texts]
        embedded = torch.zeros(len(texts), self.width, dtype=torch.float64)
        some = [place for place, text in enumerate(stripped) if text]
        if some:
            pooled = self._pool([stripped[place] for place in some]).double().cpu()
            embedded[some] = torch.nn.functional.normalize(pooled, dim=1)
        return embedded

    @abstractmethod
    def _pool(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        """Return the embedding of each text, none of them blank, of any length."""


class StateEmbedder(Embedder):
    """The model's own states: the mean over a text's tokens of the middle of the residual stream.

    The model must be the unmodified one whenever `embed` is called; embed after a trial's context
    has ended.

    Choices, measured on `tiny` with sixteen ways of declining that are not among the refusals,
    against the true answers of its contracts (d′ is the difference of mean similarities to the
    refusals over their standard deviation; docs/log.md has the table):

    * *Centred.* States of a decoder share a large common part (arXiv 1909.00512): different true
      answers are .94 alike with it, which leaves no room below 1, and d′ is 1.5. Less the mean of
      the texts that are compared, .33 and 3.1.
    * *As an answer*, behind a prompt that is not pooled. `tiny` knows one sentence that declines;
      only read as an answer it is nearer to the refusals than the truth is to a useful degree (.25
      against −.49; behind a single token −.14 against −.46). The prompt also takes up the large,
      meaningless activations of a sequence's first token (arXiv 2402.17762).
    * *Middle of the depth.* The last block's output separates a little better (d′ 3.6, the known
      sentence .21) and costs twice the blocks; in larger models middle states are the better
      embeddings (arXiv 2502.02013).

    So similarities are comparable between answers of one model on one data set, not between models.

    Args:
        loaded: The base model.
        context: Token ids of a prompt with an empty question.
        centre: Texts whose mean is taken as the origin: what answers are compared with.
        memory: What may be used; None takes what is free.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        context: Sequence[int],
        centre: Sequence[str],
        memory: DeviceMemory | None = None,
    ) -> None:
        self._loaded, self._context = loaded, tuple(context)
        self._memory = memory or DeviceMemory(loaded.device)
        self._point = max(1, loaded.n_layers // 2)
        texts = [text.strip() for text in centre if text.strip()]
        self._origin = self._states(texts).mean(0) if texts else torch.zeros(1, self.width)

    @property
    def name(self) -> str:
        """Which states."""
        return f"own states after block {self._point - 1}"

    @property
    def width(self) -> int:
        """The model's own."""
        return int(self._loaded.model.config.hidden_size)

    def _pool(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        return self._states(texts) - self._origin

    def _states(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        encoded = self._loaded.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        tree = PrefixTree([(*self._context, *ids) for ids in encoded])
        before = len(self._context)
        batch = sweep_batch(self._loaded, self._memory, 1)
        stream = capture_streams(self._loaded, tree, [self._point], batch)[self._point]
        return torch.stack(
            [stream[tree.nodes_of([row])[before:]].double().mean(0) for row in range(tree.n_rows)]
        )


class SentenceEmbedder(Embedder):
    """A sentence-embedding model: the mean of its last states over a text's tokens.

    Args:
        name: As it was asked for.
        model: An encoder, in evaluation mode.
        tokenizer: Its own.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self._name, self._model, self._tokenizer = name, model, tokenizer
        self._most = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    @property
    def name(self) -> str:
        """As it was asked for."""
        return self._name

    @property
    def width(self) -> int:
        """The model's own."""
        return int(self._model.config.hidden_size)

    @torch.inference_mode()
    def _pool(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        pooled = []
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            batch = self._tokenizer(
                list(texts[start : start + TEXTS_PER_BATCH]),
                padding=True,
                truncation=True,  # as sentence-embedding models read long texts everywhere
                max_length=self._most,
                return_tensors="pt",
            ).to(self._model.device)
            states = self._model(**batch).last_hidden_state
            pooled.append(_masked_mean(states, batch["attention_mask"]))
        return torch.cat(pooled)


def check_embedding_model(name: str) -> str:
    """Return a sentence-embedding model's hub id, or its folder from the root, without loading it.

    Raises:
        ModelError: The folder does not exist, or holds no checkpoint.
    """
    folder = Path(name).expanduser()
    if not is_folder(folder):
        if name.startswith((".", "/", "~")):
            raise ModelError(f"--embedding-model {name}: no such folder.")
        return name
    for wanted in ("config.json", "*.safetensors"):
        if not any(folder.glob(wanted)):
            raise ModelError(
                f"--embedding-model {name}: holds no {wanted} file. Give the folder of a "
                "sentence-embedding model with its config.json, tokenizer and safetensors weights."
            )
    return str(folder.resolve())


def load_sentence_embedder(name: str, *, device: str = "auto") -> SentenceEmbedder:
    """Load a sentence-embedding model by hub id or folder.

    Raises:
        ModelError: It cannot be loaded, lacks weights, or is no encoder that pads.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the commands show their own
    source = check_embedding_model(name)
    options: dict[str, Any] = {
        "trust_remote_code": False,
        "local_files_only": is_folder(Path(source)) or not hub_resolves(),
    }
    verbosity = logging.get_verbosity()
    try:
        # What is unexpected in the weights, such as a head, has no part; what lacks is checked.
        logging.set_verbosity_error()
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, report = AutoModel.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # hub, Rust and transformers raise unrelated classes
        raise ModelError(
            f"--embedding-model {name}: cannot be loaded ({str(error).partition(chr(10))[0]}) Give "
            "the hub id of a sentence-embedding model that is reachable or in the local cache, or "
            "a folder with its config.json, tokenizer and safetensors weights; without the option "
            "the model's own states are used."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    _check_encoder(name, model, tokenizer, report["missing_keys"])
    model.eval().requires_grad_(requires_grad=False).to(resolve_device(device))
    return SentenceEmbedder(name, model, tokenizer)


def _check_encoder(name: str, model: Any, tokenizer: Any, missing: Collection[str]) -> None:
    """Refuse what would give numbers without a meaning."""
    lacking = sorted(key for key in missing if not key.startswith("pooler."))  # not used here
    if lacking:
        raise ModelError(
            f"--embedding-model {name}: the weights lack {len(lacking)} tensors that its "
            f"config.json asks for, among them {lacking[0]}."
        )
    if model.config.is_encoder_decoder or tokenizer.pad_token_id is None:
        raise ModelError(
            f"--embedding-model {name}: is not an encoder with a padding token, as "
            "sentence-embedding models are. Without the option the model's own states are used."
        )


def _masked_mean(
    states: Float[Tensor, "texts seq d"], mask: Int[Tensor, "texts seq"]
) -> Float[Tensor, "texts d"]:
    """Return the mean over the tokens that the mask marks."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)
