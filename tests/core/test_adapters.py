"""Adapters as arithmetic and as files, against torch and peft; answers compared."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lunar_tune.errors import InputError, LunarTuneError
from lunar_tune.export.proof import compare
from lunar_tune.export.writing import LARGEST_ERROR, nearest_factors, write_adapter
from lunar_tune.metrics.evaluate import AnswerRow
from lunar_tune.models.loading import LoadedModel
from lunar_tune.training.adapting import Factors


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [3, 16])
def test_the_nearest_product_is_the_truncated_svd_of_torch(rank: int) -> None:
    change = drawn(16, 40)
    factors, error = nearest_factors(change, rank=rank)
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    truncated = left[:, :rank] * values[:rank] @ right[:rank]
    product = factors.second.double() @ factors.first.double()
    torch.testing.assert_close(product, truncated, rtol=0, atol=1e-5)
    lacking = float(values[rank:].square().sum().sqrt() / values.square().sum().sqrt())
    assert error == pytest.approx(lacking, abs=1e-6)


def test_without_a_rank_the_smallest_that_is_near_enough_is_taken() -> None:
    """Of singular values 1, 1, 0.1 and 0.005 the last alone may go: 0.005 / 1.418 < 1 %."""
    left, _ = torch.linalg.qr(drawn(12, 4).double())
    right, _ = torch.linalg.qr(drawn(20, 4, seed=1).double())
    change = left * torch.tensor([1.0, 1.0, 0.1, 0.005]).double() @ right.T
    factors, error = nearest_factors(change)
    assert factors.rank == 3
    assert 0.003 < error < LARGEST_ERROR
    assert nearest_factors(change, rank=2)[1] > LARGEST_ERROR
    assert nearest_factors(torch.zeros(4, 5))[1] == 0.0


def test_peft_adds_what_was_written(loaded: Callable[..., LoadedModel], tmp_path: Path) -> None:
    from peft import PeftModel

    model = copy.deepcopy(loaded("qwen2").model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factors = {
        f"model.layers.{layer}.mlp.down_proj": Factors(
            first=drawn(rank, 48), second=drawn(32, rank, seed=1), scale=scale
        )
        for layer, rank, scale in ((0, 2, 0.25), (1, 5, 3.0))
    }
    for name, one in factors.items():
        expected[f"{name}.weight"] += one.scale * one.second @ one.first
    write_adapter(tmp_path, factors, base="owner/name", revision="abc")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        merged = PeftModel.from_pretrained(model, str(tmp_path)).merge_and_unload().state_dict()
    changed = {f"{name}.weight" for name in factors}
    for name, weight in expected.items():
        exact = 0.0 if name not in changed else 1e-5
        torch.testing.assert_close(merged[name], weight, rtol=exact, atol=exact)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--save .*file/in: cannot be written"):
        write_adapter(tmp_path / "file" / "in", factors, base="owner/name", revision=None)


def row(answer: str, *, question: str = "Q?", recall: float = 0.5) -> AnswerRow:
    about = {"set_name": "forget", "edge": "A_B", "truth": "the truth"}
    return AnswerRow(**about, question=question, answer=answer, rouge1=recall, rouge_l=recall)


def test_an_answer_that_ended_having_said_the_truth_is_the_beginning_of_the_whole() -> None:
    for found, expected, differing in (
        (row("the sea"), row("the sea"), 0),
        (row("the sea"), row("the"), 1),  # cut short, but not for having said the truth
        (row("the truth, and more", recall=1.0), row("the truth", recall=1.0), 0),
        (row("the truth né", recall=1.0), row("the truth n\ufffd", recall=1.0), 0),
        (row("the truth, and more", recall=1.0), row("truth the", recall=1.0), 1),
    ):
        assert compare([found], [expected]).differing == differing


def test_rows_are_matched_by_question_and_those_of_the_search_count() -> None:
    found = [row("a", question="1?"), row("b", question="2?", recall=1.0), row("c", question="3?")]
    expected = [row("c", question="3?"), row("x", question="1?", recall=0.25)]
    one = compare(found, expected)
    assert one.differing == 1
    assert one.scores["forget_rouge1"] == 0.5
    assert one.text == "1 of 2 answers differ, forget_rouge1 is 0.5000 instead of 0.3750"
    assert not one.is_close
    with pytest.raises(LunarTuneError, match=r"asked '4\?' \(forget\), which is not asked now"):
        compare(found, [row("d", question="4?")])
