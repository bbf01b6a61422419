"""Embeddings of texts, and how alike in meaning answers are to refusals and to the truth.

Shapes: `texts` counts the texts of a call, `d` is the embedder's width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lunar_tune.engine.activations import capture_streams, sweep_batch
from lunar_tune.engine.forward import PrefixTree
from lunar_tune.errors import ModelError
from lunar_tune.files import is_folder
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.device import DeviceMemory, resolve_device
from lunar_tune.models.loading import from_hub, load_weights
from lunar_tune.models.weights import check_weights
from lunar_tune.training.answer_loss import Encoder

TEXTS_PER_BATCH = 64  # in a forward of a sentence-embedding model; such models are small


class Refusals:
    """Answers that decline, embedded once, to compare other answers with."""

    def __init__(self, embedder: Embedder, texts: Sequence[str]) -> None:
        self._embedder, self._embedded = embedder, embedder.embed(texts)

    def quality(self, answers: Sequence[str]) -> float:
        """Return the mean over answers of the mean cosine similarity to all refusals, −1 to 1."""
        return float((self._embedder.embed(answers) @ self._embedded.T).mean())


class Embedder(ABC):
    """Texts to vectors of length one, so that a product of two is their cosine similarity."""

    name: str  # what is shown and written beside a similarity, which is worth nothing without it
    width: int

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        """Return each text's embedding, in float64 and host memory.

        White space around a text is left out. A text of nothing else has no direction: its
        embedding is zero, and so is its similarity to all.
        """
        stripped = [text.strip() for text in texts]
        embedded = torch.zeros(len(texts), self.width, dtype=torch.float64)
        some = [place for place, text in enumerate(stripped) if text]
        if some:
            pooled = self._pool([stripped[place] for place in some]).double().cpu()
            embedded[some] = torch.nn.functional.normalize(pooled, dim=1)
        return embedded

    def truth_similarity(self, answers: Sequence[str], truths: Sequence[str]) -> float:
        """Return the mean cosine similarity of each answer to its own true answer, from −1 to 1."""
        return float((self.embed(answers) * self.embed(truths)).sum(1).mean())

    @abstractmethod
    def _pool(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        """Return the embedding of each text, none of them blank, of any length."""


class StateEmbedder(Embedder):
    """The model's own states: the mean over a text's tokens of the middle of the residual stream.

    The model must be the base model whenever `embed` is called. Similarities are comparable between
    answers of one model on one data set. Choices, measured on `tiny` (table in docs/log.md):

    * *Centred.* States of a decoder share a large common part (arXiv 1909.00512): different true
      answers are .94 alike with it.
    * *As an answer*, behind a prompt that is not pooled, and takes up the large, meaningless
      activations of a first token (arXiv 2402.17762).
    * *Middle of the depth*, where larger models have better embeddings (arXiv 2502.02013); the last
      block's output costs twice the blocks.

    The prompt has an empty question. The mean of `centre`, texts that answers are compared with, is
    the origin.
    """

    def __init__(
        self, encoder: Encoder, *, centre: Sequence[str], memory: DeviceMemory | None = None
    ) -> None:
        loaded = encoder.loaded
        self._encoder, self._loaded = encoder, loaded
        self._memory = memory or DeviceMemory(loaded.device)
        self._point = max(1, loaded.n_layers // 2)
        self.name = f"own states after block {self._point - 1}"
        self.width = int(loaded.model.config.hidden_size)
        texts = [text.strip() for text in centre if text.strip()]
        self._origin = self._states(texts).mean(0) if texts else torch.zeros(1, self.width)

    def _pool(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        return self._states(texts) - self._origin

    def _states(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        context = self._encoder.prompts([""])[0]
        tree = PrefixTree([(*context, *ids) for ids in self._encoder.texts(texts)])
        before = len(context)
        batch = sweep_batch(self._loaded, self._memory, 1)
        stream = capture_streams(self._loaded, tree, [self._point], batch)[self._point]
        return torch.stack(
            [stream[tree.nodes_of([row])[before:]].double().mean(0) for row in range(tree.n_rows)]
        )


class SentenceEmbedder(Embedder):
    """A sentence-embedding model: the mean of its last states over a text's tokens."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.width = name, int(model.config.hidden_size)
        self._model, self._tokenizer = model, tokenizer
        self._most = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    @torch.inference_mode()
    def _pool(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        pooled = []
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            batch = self._tokenizer(
                list(texts[start : start + TEXTS_PER_BATCH]),
                padding=True,
                truncation=True,  # as sentence-embedding models read long texts everywhere
                max_length=self._most,
                split_special_tokens=True,  # what spells a special token is text
                return_tensors="pt",
            ).to(self._model.device)
            states = self._model(**batch).last_hidden_state
            weights = batch["attention_mask"][..., None].to(states.dtype)
            pooled.append((states * weights).sum(1) / weights.sum(1))
        return torch.cat(pooled)


def check_embedding_model(name: str) -> str:
    """Return a sentence-embedding model's hub id, or its folder from the root; load nothing."""
    if is_folder(Path(name).expanduser()) or name.startswith((".", "/", "~")):
        return str(check_weights(name, "--embedding-model"))
    return name


def load_sentence_embedder(name: str, *, device: str = "auto") -> SentenceEmbedder:
    """Load a sentence-embedding model by hub id or folder, or raise a ModelError."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    spec = ModelSpec(name=name, source=check_embedding_model(name))
    verbosity = logging.get_verbosity()
    try:
        # What is unexpected in the weights, such as a head, has no part; what lacks is checked.
        logging.set_verbosity_error()
        tokenizer = from_hub(AutoTokenizer, spec, spec.source)
        # Of the pooler nothing is used.
        model = load_weights(AutoModel, spec, dtype=torch.float32, unused=("pooler.",))
        if model.config.is_encoder_decoder or tokenizer.pad_token_id is None:
            raise ModelError(f"model {name}: is not an encoder with a padding token.")
    except ModelError as error:
        raise ModelError(
            f"--embedding-model {name}: cannot be used: {error} Without the option the model's own "
            "states are used."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model.eval().requires_grad_(requires_grad=False).to(resolve_device(device))
    return SentenceEmbedder(name, model, tokenizer)
