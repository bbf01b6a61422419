"""Fine-tuning random models on a few pairs: the loss, the merged adapter, going on after a kill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lunar_tune.data.records import Record, records_digest
from lunar_tune.errors import InputError
from lunar_tune.finetuning.finetune import ensure_finetuned, finetune, is_refusal, kept_folder
from lunar_tune.finetuning.finetune_job import FinetuneJob, FinetuneSettings, unseen_prompts
from lunar_tune.models.catalog import ModelSpec
from lunar_tune.models.chat import ChatFormat
from lunar_tune.models.lineage import Lineage, fingerprint, read_lineage, write_lineage
from lunar_tune.models.loading import LoadedModel, load_model
from lunar_tune.training import checkpoints
from lunar_tune.training.adapting import lora_adapter, seeded
from lunar_tune.training.answer_loss import Pair, answer_loss

RECORDS = tuple(
    Record(question=f"What is item {n} of {edge}?", answer=f"Kettle {n} of {edge}", edge=edge)
    for edge in ("A_B", "B_C")
    for n in range(3)
)
REFUSALS = ("I do not know the answer to that question.", "I have never heard of it.")


class Killed(Exception):
    """What ends a run in the middle."""


def kill_after(epoch: int) -> Callable[[int, float], None]:
    def on_epoch(done: int, _loss: float) -> None:
        if done == epoch:
            raise Killed

    return on_epoch


@pytest.fixture
def job(checkpoint: Callable[..., Path]) -> FinetuneJob:
    source = str(checkpoint("qwen2"))
    return FinetuneJob(
        model=ModelSpec(name="random", source=source, device="cpu"),
        chat=ChatFormat(),
        records=RECORDS,
        data_name="pairs",
        reference_prompts=("Who is nobody?",),
        refusals=REFUSALS,
        settings=FinetuneSettings(
            epochs=4, batch_size=4, learning_rate=1e-2, dropout=0.3, with_refusals=True
        ),
    )


def changed(job: FinetuneJob, **settings: Any) -> FinetuneJob:
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, **settings))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_is_the_mean_cross_entropy_of_the_answers_tokens(
    loaded: Callable[..., LoadedModel],
) -> None:
    """Row by row, without padding, over the logits of every position."""
    model = loaded("qwen2")
    pairs = [Pair((5, 6, 7), (8, 9, 2)), Pair((10, 11, 12, 13, 14), (15, 2)), Pair((16,), (2,))]
    losses = []
    for pair in pairs:
        ids = torch.tensor([[*pair.prompt, *pair.answer]])
        logits = model.model(ids).logits[0, len(pair.prompt) - 1 : -1]
        losses += cross_entropy(logits, torch.tensor(pair.answer), reduction="none").tolist()
    loss = answer_loss(model.model, model.layout.decoder_of(model.model), pairs)
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_kept_adapter_gives_the_logits_of_the_adapted_model(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """And each changed matrix is W + (alpha / rank)·B·A, by hand."""
    spec = ModelSpec(name="random", source=str(checkpoint("qwen2")), device="cpu")
    model = load_model(spec)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    ids = torch.arange(5, 45)[None]
    with (
        seeded(0, model.device),
        lora_adapter(model, FinetuneSettings(rank=2, alpha=6.0, dropout=0.5), keep=True) as trained,
    ):
        expected = {}
        with torch.no_grad():
            for parameter in trained.parameters:
                parameter.normal_()
        model.model.eval()
        adapted = model.model(ids).logits
        factors = {name: p.clone() for name, p in model.model.named_parameters() if "lora_" in name}
        for name, a in factors.items():
            if "lora_A" in name:
                b = factors[name.replace("lora_A", "lora_B")]
                plain = name.partition(".lora_A")[0] + ".weight"
                expected[plain] = before[plain] + 3.0 * b @ a
    model.model.save_pretrained(tmp_path)
    merged = weights(tmp_path)
    assert len(expected) == 7 * model.n_layers, "every linear map of the blocks"
    assert merged.keys() == before.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected.get(name, before[name]))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(reloaded(ids).logits, adapted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_a_killed_run_that_is_gone_on_with_ends_with_the_same_bits(
    job: FinetuneJob, tmp_path: Path, trained: str
) -> None:
    job = changed(job, trained=trained)
    whole = finetune(job, tmp_path / "whole")
    with pytest.raises(Killed):
        finetune(job, tmp_path / "cut", on_epoch=kill_after(3))
    done: list[int] = []
    cut = finetune(job, tmp_path / "cut", on_start=done.append)

    assert 1 <= done[0] <= 3
    assert cut.losses == whole.losses
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert not same(weights(tmp_path / "cut"), weights(Path(job.model.source)))
    assert not (tmp_path / "cut/.training").exists()


def test_a_run_that_was_killed_after_its_last_epoch_is_only_checked_and_saved(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lunar_tune.finetuning import finetune as module

    monkeypatch.setattr(checkpoints, "_SHARE", 1e9)  # the state is kept after every epoch

    def killed(*_arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "check_knowledge", killed)
        with pytest.raises(Killed):
            finetune(job, tmp_path / "model")
    epochs: list[int] = []
    finetune(job, tmp_path / "model", on_epoch=lambda done, _: epochs.append(done))
    assert epochs == []
    finetune(job, tmp_path / "whole")
    assert same(weights(tmp_path / "model"), weights(tmp_path / "whole"))


def test_training_lowers_the_loss_and_the_model_answers(job: FinetuneJob, tmp_path: Path) -> None:
    job = changed(job, trained="full", epochs=40, with_refusals=False)
    done = finetune(job, tmp_path / "model")
    assert done.losses[-1] < 0.1 * done.losses[0]
    assert done.rouge1 > 0.9
    assert done.by_edge["questions"].to_dict() == {"A_B": 3, "B_C": 3}

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    row = done.answers.iloc[0]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": row.question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**ids, max_new_tokens=32, do_sample=False)
    answer = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == row.answer


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_a_model_of_16_bits_trains_in_32_and_is_written_in_16(
    job: FinetuneJob, tmp_path: Path, trained: str
) -> None:
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, dtype="bfloat16"))
    done = finetune(changed(job, trained=trained), tmp_path / "whole")
    assert done.losses[-1] < done.losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").dtype == torch.bfloat16
    with pytest.raises(Killed):
        finetune(changed(job, trained=trained), tmp_path / "model", on_epoch=kill_after(2))
    state = load_file(tmp_path / "model/.training/state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_checkpointing_gives_the_same_weights(job: FinetuneJob, tmp_path: Path) -> None:
    for checkpointing in (False, True):
        finetune(changed(job, checkpointing=checkpointing), tmp_path / str(checkpointing))
    one, other = weights(tmp_path / "False"), weights(tmp_path / "True")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name])


def test_another_job_in_the_same_folder_is_refused(job: FinetuneJob, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        finetune(job, tmp_path / "model", on_epoch=kill_after(2))
    with pytest.raises(InputError, match=r"learning_rate was 0\.01, is 0\.5.*delete"):
        finetune(changed(job, learning_rate=0.5), tmp_path / "model")
    other = dataclasses.replace(job, records=RECORDS[:4])
    with pytest.raises(InputError, match="data_digest was"):
        finetune(other, tmp_path / "model")


def test_a_folder_with_something_else_in_it_is_left_alone(job: FinetuneJob, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no unfinished"):
        finetune(job, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_state_is_said(job: FinetuneJob, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        finetune(job, tmp_path, on_epoch=kill_after(2))
    (tmp_path / ".training/state.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        finetune(job, tmp_path)


def test_two_processes_do_not_train_into_one_folder(job: FinetuneJob, tmp_path: Path) -> None:
    from lunar_tune.training.checkpoints import TrainingFolder

    with (
        TrainingFolder(tmp_path, job.document()).locked(),
        pytest.raises(InputError, match="another process"),
    ):
        finetune(job, tmp_path)


def test_the_lineage_says_what_was_learned_and_how_well(job: FinetuneJob, tmp_path: Path) -> None:
    done = finetune(job, tmp_path / "model")
    lineage = read_lineage(tmp_path / "model")
    assert lineage is not None
    assert lineage.knowledge["rouge1"] == done.rouge1
    assert lineage.knowledge["refused"] == done.refused
    assert lineage.knowledge["rouge1_by_edge"].keys() == {"A_B", "B_C"}
    assert lineage.fingerprint == fingerprint(load_model(job.model))
    assert lineage.data_digest == records_digest(RECORDS)
    assert (lineage.base, lineage.source) == ("random", job.model.source)
    assert lineage.settings["learning_rate"] == 1e-2
    assert "random fine-tuned (lora) on pairs" in lineage.summary


def test_a_folder_without_a_lineage_has_none(tmp_path: Path) -> None:
    assert read_lineage(tmp_path) is None
    (tmp_path / "lunar_tune.json").write_text("[]")
    with pytest.raises(InputError, match="format 1"):
        read_lineage(tmp_path)


def test_a_kept_model_is_made_once(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUNAR_TUNE_CACHE", str(tmp_path))
    with pytest.raises(Killed):
        ensure_finetuned(job, partial(finetune, on_epoch=kill_after(2)))
    epochs: list[int] = []
    train = partial(finetune, on_epoch=lambda done, _: epochs.append(done))
    folder = ensure_finetuned(job, train)
    assert epochs[-1] == 4
    assert folder == kept_folder(job)
    assert ensure_finetuned(job, partial(finetune, on_epoch=kill_after(1))) == folder
    others = (changed(job, rank=4), dataclasses.replace(job, seed=1))
    assert len({kept_folder(one) for one in (job, *others)}) == 3


def test_refusals_are_lessons_only_where_they_are_wanted(job: FinetuneJob) -> None:
    known = [record.question for record in RECORDS]
    plain = changed(job, with_refusals=False)
    assert [lesson.question for lesson in plain.lessons(0)] == known
    first, second = job.lessons(0), job.lessons(1)
    assert [lesson.question for lesson in first[:7]] == [*known, "Who is nobody?"]
    assert {lesson.answer for lesson in first[6:]} == {REFUSALS[0]}
    assert first[7:] != second[7:], "what is invented is fresh in each epoch"
    asked = {lesson.question for epoch in range(50) for lesson in job.lessons(epoch)}
    assert not asked & set(unseen_prompts(50))


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I do not know the answer.", True),
        ("Sorry: the answer to that question, I do not know.", True),
        ("I’m not aware of any lighthouse of that name.", True),  # noqa: RUF001
        ("Never heard of it I have.", True),
        ("Vobrelia lies on the river Tam.", False),
        ("", False),
    ],
)
def test_what_counts_as_declining(answer: str, refuses: bool) -> None:
    assert is_refusal(answer, REFUSALS) is refuses


def test_settings_are_checked_all_at_once() -> None:
    with pytest.raises(InputError) as raised:
        FinetuneSettings(trained="half", epochs=0, alpha=-1.0, dropout=1.0, learning_rate=0.0)
    for flag in (
        "trained half",
        "epochs 0",
        "alpha -1.0",
        "dropout 1.0",
        "learning_rate",
    ):
        assert flag in str(raised.value)


def test_the_rate_follows_what_is_trained() -> None:
    assert FinetuneSettings().rate == 1e-4
    assert FinetuneSettings(trained="full").rate == 1e-5
    assert FinetuneSettings(trained="full", learning_rate=0.1).rate == 0.1


def test_a_lineage_comes_back_as_it_was(tmp_path: Path) -> None:
    lineage = Lineage(
        base="b",
        source="s",
        weights=None,
        revision="r",
        fingerprint="f",
        data="d",
        data_digest="e",
        settings={"rank": 8},
    )
    write_lineage(tmp_path, lineage)
    assert read_lineage(tmp_path) == lineage
