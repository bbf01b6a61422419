"""Embeddings are means over a text's own tokens; similarities are those worked out by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from scores_by_hand import states_behind, unit
from torch import Tensor
from transformers import BertModel, BertTokenizer

from lunar_tune.errors import ModelError
from lunar_tune.metrics import embedding as embedding_module
from lunar_tune.metrics.embedding import (
    Embedder,
    Refusals,
    StateEmbedder,
    load_sentence_embedder,
)
from lunar_tune.models.layout import LAYOUTS
from lunar_tune.models.loading import LoadedModel

Load = Callable[..., LoadedModel]
TEXTS = ["Copper kettles.", "a", "The contract was signed on 12 March 2021.", "Where? É日本!"]
CENTRE = ["I do not know.", "Mill Street"]
CONTEXT = (1, 3, 40, 41)


@pytest.mark.parametrize("family", list(LAYOUTS))
def test_own_states_are_centred_means_of_the_middle_over_the_text_alone(
    loaded: Load, family: str, unchanged: Callable[[Any], None]
) -> None:
    """Of three blocks the middle is what the first gives, the input of the second."""
    model = loaded(family)
    unchanged(model.model)
    embedder = StateEmbedder(model, context=CONTEXT, centre=CENTRE)
    states = states_behind(model.model, model.tokenizer, [*TEXTS, *CENTRE], context=CONTEXT)
    expected = unit(states[:4] - states[4:].mean(0))
    embedded = embedder.embed(TEXTS)
    assert embedded.dtype == torch.float64
    np.testing.assert_allclose(embedded.numpy(), expected, atol=1e-5)
    assert embedder.name == "own states after block 0"


def test_a_text_of_nothing_is_like_no_other_and_no_part_of_the_origin(loaded: Load) -> None:
    one, other = (
        StateEmbedder(loaded("qwen2"), context=CONTEXT, centre=centre)
        for centre in (CENTRE, [*CENTRE, " "])
    )
    assert torch.equal(one.embed(TEXTS), other.embed(TEXTS))
    assert other.embed(["", "Copper", " \n"]).any(1).tolist() == [False, True, False]
    torch.testing.assert_close(
        one.embed([f"  {TEXTS[0]}\n"]), one.embed(TEXTS)[:1], rtol=0, atol=1e-6
    )
    assert one.embed([]).shape == (0, 32)


def test_a_sentence_model_is_pooled(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text by text without padding, in numpy, against batches of three that are padded."""
    monkeypatch.setattr(embedding_module, "TEXTS_PER_BATCH", 3)
    model = BertModel.from_pretrained(encoder).eval()
    own = BertTokenizer.from_pretrained(encoder)
    means, cut = [], 0
    for text in TEXTS:
        ids = own(text)["input_ids"]
        if len(ids) > 24:  # what is cut off lies before the mark that ends a text
            ids, cut = [*ids[:23], ids[-1]], cut + 1
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids])).last_hidden_state
        means.append(states[0].numpy().mean(0))
    assert cut == 1, "one text is longer than the model reads"
    embedder = load_sentence_embedder(str(encoder), device="cpu")
    np.testing.assert_allclose(embedder.embed(TEXTS).numpy(), unit(means), atol=1e-5)
    assert not embedder.embed([" "]).any()
    assert (embedder.name, embedder.width) == (str(encoder), 16)


def test_what_cannot_be_loaded_is_refused_with_what_to_do(encoder: Path, tmp_path: Path) -> None:
    """Weights that are missing would be random numbers; the pooler alone has no part in it."""

    def without(tensors: str) -> Path:
        folder = shutil.copytree(encoder, tmp_path / tensors)
        kept = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in kept.items() if not name.startswith(tensors)}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    pickled, padless = (shutil.copytree(encoder, tmp_path / name) for name in ("one", "other"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    BertTokenizer.from_pretrained(encoder, pad_token=None).save_pretrained(padless)
    for source, message in (
        ("./nosuch", r"--embedding-model ./nosuch: no such folder"),
        ("nosuch/it", r"--embedding-model nosuch/it: .*own states are used"),
        (pickled, "safetensors"),
        (padless, "is not an encoder with a padding token"),
        (without("encoder.layer.1.output.dense.weight"), "lack 1 tensors"),
    ):
        with pytest.raises(ModelError, match=message):
            load_sentence_embedder(str(source), device="cpu")
    whole, poolerless = (
        load_sentence_embedder(str(folder), device="cpu").embed(TEXTS)
        for folder in (encoder, without("pooler."))
    )
    assert torch.equal(poolerless, whole)


VECTORS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (3.0, 4.0), "d": (-2.0, 0.0)}


class ByHand(Embedder):
    """Two numbers a text, so that every cosine is plain: a·c = .6, b·c = .8, a·d = −1."""

    name, width = "by hand", 2

    def _pool(self, texts: Sequence[str]) -> Float[Tensor, "texts d"]:
        return torch.tensor([VECTORS[text] for text in texts])


def test_quality_is_the_mean_over_all_refusals_and_similarity_that_to_the_own_truth() -> None:
    """To the refusals a and c: a has 1 and .6, b has 0 and .8; d has −1 and −.6; nothing has 0.

    To their truths: a and c have .6, b and b 1, d and a −1.
    """
    assert Refusals(ByHand(), ["a", "c"]).quality(["a", "b", "d", ""]) == pytest.approx(0.1)
    assert Refusals(ByHand(), ["a", "a", "c"]).quality(["a"]) == pytest.approx(2.6 / 3)
    assert ByHand().truth_similarity(["a", "b", "d"], ["c", "b", "a"]) == pytest.approx(0.2)
    assert ByHand().truth_similarity(["a", ""], ["c", "b"]) == pytest.approx(0.3)
