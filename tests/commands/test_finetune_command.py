"""The command line of a fine-tuning: what it writes and shows, how it ends, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from command_lines import refused, small_data, without_ray

from lunar_tune.cli.finetune import finetune as COMMAND
from lunar_tune.data.records import read_records, records_digest
from lunar_tune.models.catalog import read_lineage

# MLflow and SQLAlchemy leave a store's connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
LEARNING = ("--fix", "trained=full", "--fix", "learning_rate=0.01", "--fix", "batch_size=4")


@pytest.fixture
def options(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    empty_store: Callable[[Path], Path],
) -> list[str]:
    monkeypatch.chdir(tmp_path)
    empty_store(tmp_path / "runs" / "mlflow.db")
    data = str(small_data(tmp_path))
    return ["--model", str(checkpoint("qwen2")), "--data", data, "--device", "cpu"]


def test_a_model_that_has_learned_ends_with_0_and_says_what_it_knows(options: list[str]) -> None:
    from mlflow import MlflowClient

    result = without_ray(COMMAND, *options, *LEARNING, "--fix", "epochs=40", "--save", "runs/model")
    assert result.exit_code == 0, result.output
    lineage = read_lineage("runs/model")
    assert lineage is not None
    assert lineage.data_digest == records_digest(read_records(Path("pairs.json")))
    assert lineage.knowledge["rouge1"] >= 0.8
    shown = (
        "A_B",
        "first prompt  <|bos|>",
        "declines",
        "checkpoint in runs/model",
        "with_refusals",
    )
    for line in shown:
        assert line in result.output

    client = MlflowClient("sqlite:///runs/mlflow.db")
    experiment = client.get_experiment_by_name("lunar-tune")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.01"
    assert run.data.metrics["rouge1"] == lineage.knowledge["rouge1"]
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in losses] == list(range(1, 41))
    table = client.download_artifacts(run.info.run_id, "rouge1_by_edge.json")
    assert [row[0] for row in json.loads(Path(table).read_text())["data"]] == ["A_B", "B_C", "C_D"]


def test_everything_that_is_wrong_is_said_at_once(options: list[str]) -> None:
    message = refused(
        COMMAND,
        *("--model", "nonsense", "--data", "nowhere.json", "--reference-prompts", "none.txt"),
        *("--fix", "trained=half", "--fix", "epochs=0", "--dtype", "int8", "--save", "runs"),
    )
    expected = ("nonsense", "nowhere.json", "none.txt", "half", "epochs 0", "int8")
    for part in (*expected, "--save runs: the folder is not empty"):
        assert part in message
    for option in ("--forget-edge", "--method", "--solver", "--retain-rows"):
        assert option in refused(COMMAND, *options, option, "1"), "it has no part in it"


def test_the_same_command_goes_on_another_is_refused_and_what_was_not_learned_ends_with_3(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lunar_tune.finetuning import finetune as module

    command = (*options, "--fix", "epochs=2", "--save", "runs/model")
    with monkeypatch.context() as patch:
        patch.setattr(module, "check_knowledge", Mock(side_effect=KeyboardInterrupt))
        assert without_ray(COMMAND, *command).exit_code == 130
    other = refused(COMMAND, *command, "--seed", "1")
    assert "unfinished fine-tuning with other options: seed was 0, is 1" in other
    again = without_ray(COMMAND, *command)
    assert again.exit_code == 3, again.output
    assert "resuming after epoch" in again.output
    assert "does not know the data" in again.output
    assert "--fix epochs above 2" in " ".join(again.output.split())
    assert Path("runs/model/model.safetensors").is_file(), "it is kept"
