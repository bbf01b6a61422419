"""Fine-tuning random models on a few pairs, going on after a kill, and the gradient loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from trial_specs import generated

from lunar_tune.data.records import Record, records_digest
from lunar_tune.data.splits import generate_unverifiable
from lunar_tune.errors import DivergenceError, InputError
from lunar_tune.finetuning import finetune as module
from lunar_tune.finetuning.finetune import (
    Finetuned,
    ensure_finetuned,
    finetune,
    kept_folder,
)
from lunar_tune.finetuning.finetune_job import UNSEEN, FinetuneJob, FinetuneSettings
from lunar_tune.models.catalog import ModelSpec, read_lineage
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.fingerprint import fingerprint
from lunar_tune.models.loading import load_model
from lunar_tune.training import TrainingSettings, checkpoints
from lunar_tune.training.checkpoints import TrainingFolder
from lunar_tune.training.gradient_loop import scheduled, train_epochs

RECORDS = tuple(
    Record(question=f"What is item {n} of {edge}?", answer=f"Kettle {n} of {edge}", edge=edge)
    for edge, count in (("A_B", 3), ("B_C", 2))
    for n in range(count)
)
REFUSALS = ("I do not know the answer to that question.", "I have never heard of it.")


class Killed(Exception):
    """What ends a run in the middle."""


def kill_after(epoch: int) -> Callable[[int, float], None]:
    def on_epoch(done: int, _loss: float) -> None:
        if done == epoch:
            raise Killed

    return on_epoch


def killed(job: FinetuneJob, folder: Path, epoch: int = 2) -> None:
    """Train until an epoch has ended."""
    with pytest.raises(Killed):
        finetune(job, folder, on_epoch=kill_after(epoch))


@pytest.fixture(scope="module", autouse=True)
def _few_unanswerable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_UNANSWERABLE", 3)
        yield


@pytest.fixture(scope="module")
def job(checkpoint: Callable[..., Path]) -> FinetuneJob:
    source = str(checkpoint("qwen2", num_hidden_layers=2))
    return FinetuneJob(
        model=ModelSpec(name="random", source=source, device="cpu"),
        chat=ChatFormat(),
        records=RECORDS,
        data_name="pairs",
        reference_prompts=("Who is nobody?",),
        refusals=REFUSALS,
        settings=FinetuneSettings(
            epochs=3, batch_size=4, learning_rate=1e-2, dropout=0.3, with_refusals=True
        ),
    )


def changed(job: FinetuneJob, **settings: Any) -> FinetuneJob:
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, **settings))


Whole = Callable[[str], tuple[Path, Finetuned]]


@pytest.fixture(scope="module")
def whole(job: FinetuneJob, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a function that gives what an undisturbed run makes, each made once."""

    @cache
    def make(trained: str) -> tuple[Path, Finetuned]:
        folder = tmp_path_factory.mktemp(trained) / "whole"
        return folder, finetune(changed(job, trained=trained), folder)

    return make


def test_training_lowers_the_loss_and_the_model_answers(job: FinetuneJob, tmp_path: Path) -> None:
    spelled = Record("What ends <|im_start|>?", "The token <|im_end|> ends it.", edge="B_C")
    job = changed(job, trained="full", epochs=40, with_refusals=False)
    done = finetune(dataclasses.replace(job, records=(*RECORDS, spelled)), tmp_path)
    assert done.losses[-1] < 0.1 * done.losses[0]
    assert done.rouge1 > 0.9
    assert done.by_edge["questions"].to_dict() == {"A_B": 3, "B_C": 3}
    assert done.answers["answer"].iloc[-1] == spelled.answer
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    row = done.answers.iloc[0]
    assert generated(tmp_path, model, [row.question], budget=32) == [row.answer]


def test_the_lineage_says_what_was_learned_and_how_well(
    job: FinetuneJob, whole: Whole, tmp_path: Path
) -> None:
    folder, done = whole("lora")
    lineage = read_lineage(folder)
    assert lineage is not None
    knowledge = lineage.knowledge
    assert (knowledge["rouge1"], knowledge["refused"]) == (done.rouge1, done.refused)
    assert knowledge["rouge1_by_edge"].keys() == {"A_B", "B_C"}
    assert lineage.fingerprint == fingerprint(load_model(job.model))
    assert lineage.data_digest == records_digest(RECORDS)
    assert (lineage.base, lineage.source) == ("random", job.model.source)
    assert lineage.settings["learning_rate"] == 1e-2
    assert "random fine-tuned (lora) on pairs" in lineage.summary
    assert read_lineage(tmp_path) is None


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_16_bit_models_train_in_32(job: FinetuneJob, tmp_path: Path, trained: str) -> None:
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, dtype="bfloat16"))
    job = changed(job, trained=trained)
    killed(job, tmp_path)
    state = load_file(tmp_path / ".training/state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    done = finetune(job, tmp_path)
    assert done.losses[-1] < done.losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_a_killed_run_that_is_gone_on_with_ends_with_the_same_bits(
    job: FinetuneJob, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    epoch = {"lora": 3, "full": 2}[trained]
    monkeypatch.setattr(checkpoints, "_SHARE", 1e9)  # the state is kept after every epoch
    job, (expected, undisturbed) = changed(job, trained=trained), whole(trained)
    killed(job, tmp_path, epoch)
    begun: list[int] = []
    assert finetune(job, tmp_path, on_start=begun.append).losses == undisturbed.losses
    assert begun[0] in {epoch - 1, epoch}
    first, second = ((one / "model.safetensors").read_bytes() for one in (tmp_path, expected))
    assert first == second
    assert not (tmp_path / ".training").exists()


def test_what_cannot_be_gone_on_with_is_refused(job: FinetuneJob, tmp_path: Path) -> None:
    """Another job, a damaged state, a folder in use, a folder with something else in it."""
    folder, other = tmp_path / "model", tmp_path / "other"
    killed(job, folder)
    with pytest.raises(InputError, match=r"learning_rate was 0\.01, is 0\.5.*delete"):
        finetune(changed(job, learning_rate=0.5), folder)
    with pytest.raises(InputError, match="data_digest was"):
        finetune(dataclasses.replace(job, records=RECORDS[:4]), folder)
    (folder / ".training/state.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        finetune(job, folder)
    with (
        TrainingFolder(folder, job.document()).locked(),
        pytest.raises(InputError, match="another process"),
    ):
        finetune(job, folder)
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no unfinished"):
        finetune(job, other)
    assert [file.name for file in other.iterdir()] == ["notes.txt"]


def test_a_kept_model_is_made_once(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path))
    with pytest.raises(Killed):
        ensure_finetuned(job, partial(finetune, on_epoch=kill_after(2)))
    epochs: list[int] = []
    train = partial(finetune, on_epoch=lambda done, _: epochs.append(done))
    folder = ensure_finetuned(job, train)
    assert epochs[-1] == 3
    assert folder == kept_folder(job)
    assert ensure_finetuned(job, partial(finetune, on_epoch=kill_after(1))) == folder
    others = (changed(job, rank=4), dataclasses.replace(job, seed=1))
    assert len({kept_folder(one) for one in (job, *others)}) == 3
    for name, value in (("_unit_of_halves", lambda: "AMX"), ("SMALL_MODEL", 0)):
        monkeypatch.setattr(f"lunar_tune.models.device.{name}", value)
    assert kept_folder(job) == folder, "a processor whose trials are in bfloat16 finds it too"


def test_refusals_are_lessons_only_where_they_are_wanted(job: FinetuneJob) -> None:
    known = [record.question for record in RECORDS]
    plain = changed(job, with_refusals=False)
    assert [lesson.question for lesson in plain.lessons(0)] == known
    first, second = job.lessons(0), job.lessons(1)
    assert [lesson.question for lesson in first[:6]] == [*known, "Who is nobody?"]
    assert {lesson.answer for lesson in first[5:]} == {REFUSALS[0]}
    assert first[6:] != second[6:], "what is invented is fresh in each epoch"
    asked = {lesson.question for epoch in range(50) for lesson in job.lessons(epoch)}
    assert not asked & set(generate_unverifiable(50, seed=UNSEEN))


def test_settings_are_checked_all_at_once_and_the_rate_follows_what_is_trained() -> None:
    with pytest.raises(InputError) as raised:
        FinetuneSettings(trained="half", epochs=0, learning_rate=0.0)
    assert len(raised.value.messages) == 3
    assert FinetuneSettings().rate == 1e-4
    assert FinetuneSettings(trained="full").rate == 1e-5
    assert FinetuneSettings(trained="full", learning_rate=0.1).rate == 0.1


def test_a_gradient_that_is_no_number_ends_it_before_a_weight_changes() -> None:
    """The root's at 0 is infinite."""
    weight = nn.Parameter(torch.zeros(1, 1))
    model, settings = nn.ParameterList([weight]), TrainingSettings()

    def loss(_: object) -> torch.Tensor:
        return weight.sqrt().sum()

    with pytest.raises(DivergenceError, match="gradient"):
        next(train_epochs(model, lambda _: [0], loss, settings, learning_rate=0.1))
    assert weight.item() == 0.0


def test_the_rate_follows_the_schedule() -> None:
    """Half of a warm-up of a tenth; half of the way from there to the end; the end."""
    for cosine in (False, True):
        for progress, factor in ((0.05, 0.5), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0)):
            found = scheduled(progress, warmup_share=0.1, cosine=cosine)
            assert found == pytest.approx(factor)


@pytest.mark.parametrize(("steps", "moved"), [(1, 1), (2, 1 + 0.5), (20, 10.5), (40, 20)])
def test_the_first_of_few_steps_is_taken_at_the_rate(steps: int, moved: float) -> None:
    """With a constant gradient AdamW moves by the rate: 1, (1 - 1/2), ... to zero.

    A twentieth of 40 steps are the warm-up 0, 1/2; then 38/38 ... 1/38, together 19.5.
    """
    weight = nn.Parameter(torch.zeros(1, 1))
    model, settings = nn.ParameterList([weight]), TrainingSettings(epochs=steps, weight_decay=0.0)

    def losses(_: object) -> torch.Tensor:
        return weight.sum()

    for _ in train_epochs(
        model, lambda _: [0], losses, settings, learning_rate=0.01, warmup_share=0.05
    ):
        pass
    assert -weight.item() / 0.01 == pytest.approx(moved, rel=1e-4)
