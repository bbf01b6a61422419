"""The search's command line: help, dry run, and wrong inputs that end in one message."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_lines import Result, finish, start, without_ray

from lunar_tune.cli.search import COMMAND

OPTIONS = (
    "--model",
    "--model-path",
    "--method",
    "--solver",
    "--data",
    "--forget-edge",
    "--factual-data",
    "--reference-prompts",
    "--retain-rows",
    "--space",
    "--layer-prior",
    "--start-from",
    "--num-trials",
    "--time-budget",
    "--constrain",
    "--range",
    "--fix",
    "--sampler",
    "--output",
    "--name",
    "--tracking-uri",
    "--gpus-per-trial",
    "--concurrency",
    "--address",
    "--seed",
    "--dry-run",
    "--force",
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Result:
    return without_ray(COMMAND, *arguments)


def refused(*arguments: str) -> str:
    """Return the one message of a refused search."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    assert list(Path.cwd().glob("runs*")) == []
    return result.stderr


def test_help_names_every_option() -> None:
    result = invoke("--help-all")
    assert result.exit_code == 0
    words = result.output.replace("│", " ").replace(",", " ").split()
    assert [option for option in OPTIONS if option not in words] == []
    assert "Exit codes: 0" in result.output


def test_a_dry_run_shows_the_plan_and_writes_nothing() -> None:
    result = invoke("--dry-run", "--model", "qwen2.5-7b", "--num-trials", "7", "--seed", "1")
    assert result.exit_code == 0, result.output
    for part in ("qwen2.5-7b", "contracts: forget A_B", "7 by gp", "lunar (adamw)"):
        assert part in result.output
    assert list(Path.cwd().iterdir()) == []


def test_a_dry_run_looks_at_a_store_and_leaves_it_as_it_is(
    tmp_path: Path, empty_store: Callable[[Path], Path]
) -> None:
    store = empty_store(tmp_path / "runs" / "mlflow.db")
    content = store.read_bytes()
    result = invoke("--dry-run", "--in-process")
    assert result.exit_code == 0, result.output
    for part in ("runs can be written", "answers; experiment lunar-tune, to be made", "one trial"):
        assert part in " ".join(result.output.split())
    assert (store.read_bytes(), [*store.parent.iterdir()]) == (content, [store])
    store.write_bytes(b"no database")
    broken = invoke("--dry-run")
    assert broken.exit_code == 2
    assert "mlflow.db cannot be used: file is not a database" in broken.stderr


def test_a_dry_run_needs_neither_ray_nor_mlflow(tmp_path: Path) -> None:
    code = """
import sys
for name in ("ray", "mlflow"):
    sys.modules[name] = None
import runpy
sys.argv = ["search", "--dry-run"]
runpy.run_module("lunar_tune.search", run_name="__main__")
"""
    done = finish(start([sys.executable, "-c", code], cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    assert "nothing was run" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model", "qwen3.5-7b"), "qwen3.5-7b"),
        (("--model-path", "/no/such/folder"), "/no/such/folder"),
        (("--constrain", "retain_rouge1>=7"), "retain_rouge1>=7"),
        (("--data", "nosuch.json"), "nosuch.json"),
        (("--factual-data", "nosuch.json"), "nosuch.json"),
        (("--reference-prompts", "nosuch.json"), "nosuch.json"),
        (("--forget-edge", "X_Y"), "A_B"),
        (("--layer-prior", "nosuch.json"), "nosuch.json: cannot be read"),
        (("--layer-prior", "auto", "--method", "npo"), "--layer-prior auto: layers are scored"),
        (("--sampler", "grid"), "unknown sampler 'grid'. There are: gp, tpe, random."),
        (("--solver", "sgd"), "solver sgd: there are adamw, closed_form, lora."),
        (("--method", "nop"), "unknown method 'nop'"),
        (("--method", "dpo", "--refusals", "nosuch.txt"), "nosuch.txt"),
        (("--space", "nosuch"), "--space nosuch: neither a file nor a shipped name."),
        (("--fix", "retain_points=many"), "retain_points many: a number is needed"),
        (("--retain-rows", "0"), "--retain-rows 0: at least 1."),
        (("--num-trials", "0"), "--num-trials 0: at least 1."),
        (("--device", "tpu"), "--device tpu: unknown."),
        (("--rouge-tokenizer", "mecab"), "--rouge-tokenizer mecab: there are default, words."),
        (("--name", "../x"), "--name ../x: a plain name"),
        (("--chat-template", "nosuch.jinja"), "nosuch.jinja"),
    ],
)
@pytest.mark.parametrize("mode", [(), ("--dry-run",)], ids=["run", "dry"])
def test_a_wrong_input_ends_in_one_message(
    arguments: tuple[str, ...], expected: str, mode: tuple[str, ...]
) -> None:
    assert expected in refused(*arguments, *mode)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_is_not_demanded_where_there_is_none() -> None:
    assert "--gpus-per-trial 1: this machine has 0 CUDA" in refused("--gpus-per-trial", "1")
    assert "sees no CUDA devices here" in refused("--device", "cuda")


def test_a_layer_beyond_the_model_names_file_and_depth(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text(
        "lunar: {adamw: {parameters: {layer: {type: int, low: 0, high: 40}, coefficient: "
        "{type: fixed, value: 2.0}, learning_rate: {type: fixed, value: 0.01}}}}"
    )
    message = refused("--space", str(path))
    assert str(path) in message
    assert "the model has blocks 0 to 3" in message


def test_a_name_that_is_taken_is_refused_even_by_a_dry_run(tmp_path: Path) -> None:
    (tmp_path / "out/n").mkdir(parents=True)
    (tmp_path / "out/n/anything").touch()
    for mode in ((), ("--dry-run",)):
        assert "--name n: out/n exists already" in refused("--output", "out", "--name", "n", *mode)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in refused("--output", "file")


def test_everything_that_is_wrong_is_said_in_one_message() -> None:
    message = refused(
        *("--constrain", "retain_rouge1>=7", "--sampler", "grid", "--fix", "layer"),
        *("--forget-edge", "X_Y", "--space", "nosuch"),
        *("--reference-prompts", "nosuch.json", "--num-trials", "0", "--max-new-tokens", "0"),
    )
    assert message.count("things are wrong") == 1
    listed = [line for line in message.splitlines() if line.startswith("  - ")]
    for part in (
        "retain_rouge1>=7",
        "unknown sampler 'grid'",
        "--fix layer",
        "X_Y",
        "nosuch.json",
        "--num-trials 0",
        "--max-new-tokens 0",
    ):
        assert sum(part in line for line in listed) == 1, part
    assert message.startswith(f"error: {len(listed)} things are wrong:")


def test_a_number_that_is_none_is_refused_by_name() -> None:
    result = invoke("--num-trials", "many")
    assert result.exit_code == 2
    assert "--num-trials" in result.output


def test_answers_without_a_word_for_rouge_are_named(tmp_path: Path) -> None:
    pairs = [
        {"edge": "A_B", "question": "Кто?", "answer": "Иван Петров"},
        {"edge": "A_B", "question": "Who?", "answer": "Peter"},
        {"edge": "B_C", "question": "Where?", "answer": "Mill Street"},
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    message = refused("--data", str(path), "--dry-run")
    assert "1 true answers" in message
    assert "A_B: 'Кто?' -> 'Иван Петров'" in message
    assert "--rouge-tokenizer words" in message

    chosen = invoke("--data", str(path), "--dry-run", "--rouge-tokenizer", "words")
    assert chosen.exit_code == 0, chosen.output


def test_debug_shows_the_traceback() -> None:
    result = invoke("--debug", "--constrain", "retain_rouge1>=7")
    assert result.exit_code == 2
    trace, message = result.stderr.rsplit("error: ", 1)
    assert trace.startswith("Traceback (most recent call last):\n")
    assert "retain_rouge1>=7" in message


def test_quiet_shows_errors_only() -> None:
    assert invoke("--quiet", "--dry-run").output == ""
    assert "retain_rouge1>=7" in refused("--quiet", "--constrain", "retain_rouge1>=7")
