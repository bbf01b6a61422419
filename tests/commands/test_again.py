"""Options that lead to a search's configuration again: what is written reads back the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lunar_tune.cli import search as command
from lunar_tune.cli.options.again import given_again
from lunar_tune.cli.running import command_app
from lunar_tune.config.search_config import SearchConfig


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that gives the configuration and origins which the command reads."""
    seen: list[tuple[SearchConfig, dict[str, str]]] = []

    def note(config: SearchConfig, problems: Any, origins: dict[str, str], **_: Any) -> int:
        problems.raise_if_any()
        seen.append((config, origins))
        return 0

    monkeypatch.setattr(command, "_run", note)

    def configuration(*arguments: str) -> tuple[SearchConfig, dict[str, str]]:
        app: typer.Typer = command_app(command.search)
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output + result.stderr
        return seen.pop()

    return configuration


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "qwen2.5-7b", "--data", "my file.json", "--forget-edge", "A_B,C_D"],
        ["--method", "npo", "--train", "full", "--weight-decay", "0.5", "--epochs", "3"],
        ["--solver", "closed_form", "--retain-points", "0.5", "--whole-answers", "--holdout"],
        ["--minimise", "forget_mrr", "--constrain", "retain_mrr>=0.5", "--constrain", "x<=1"],
        ["--no-bounded", "--no-starting-points", "--keep", "--num-trials", "7", "--seed", "4"],
        ["--metrics", "forget_mrr,retain_mrr", "--no-reuse", "--output", "else where"],
        ["--name", "n", "--force"],
    ],
)
def test_what_is_given_again_leads_to_the_same_configuration(
    arguments: list[str], read: Any
) -> None:
    config, origins = read(*arguments)
    again = given_again(config, origins, base=command._BASE)
    assert read(*again)[0] == dataclasses.replace(config, name=None, force=False)


def test_a_password_is_not_given_again(read: Any) -> None:
    config, origins = read("--tracking-uri", "http://me:s3cret@x@host:5000")
    again = given_again(config, origins, base=command._BASE)
    assert again == ("--tracking-uri", "http://me:***@host:5000")


def test_only_what_was_given_is_given_again(read: Any) -> None:
    config, origins = read("--model", "tiny", "--num-trials", "9", "--name", "n")
    assert given_again(config, origins, base=command._BASE) == ("--num-trials", "9")
