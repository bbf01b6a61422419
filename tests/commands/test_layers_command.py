"""The command line that scores layers: table, files, mistakes, and the tiny model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import command_lines
import numpy as np
import pytest
from PIL import Image

from lunar_tune.cli.layers import layers as COMMAND
from lunar_tune.trial.layer_scores import read_layer_prior

refused = partial(command_lines.refused, COMMAND)
succeeded = partial(command_lines.succeeded, COMMAND)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(small: list[str]) -> list[str]:
    """Return the options without the one that has no part in layers."""
    place = small.index("--factual-data")
    return small[:place] + small[place + 2 :]


def test_a_run_prints_a_table_and_writes_what_it_was_asked_for(small: list[str]) -> None:
    output = succeeded(
        *small, "--json", "new/l.json", "--save", "l.png", "--fix", "coefficient=0.5"
    )
    prior = read_layer_prior(Path("new/l.json"))
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}

    assert [one.layer for one in prior.layers] == [0, 1, 2]
    assert (prior.rows, prior.max_new_tokens, prior.coefficient) == (3, 4, 0.5)
    for one in prior.layers:
        cells = lines[str(one.layer)]
        scores = [f"{value:.3f}" for value in (one.s1, one.s2, one.score)]
        assert cells[1:5] == [*scores, f"{one.unfinished}/3"]
        assert (cells[5] == "best") is (one.layer == prior.best)
    assert lines["none"][3] == f"{prior.base_model.score:.3f}"
    assert f"recommended: {', '.join(map(str, prior.recommended))} " in output
    assert np.asarray(Image.open("l.png").convert("RGB")).std() > 0.03 * 255
    for line in ("scores written to new/l.json", "picture written to l.png"):
        assert line in output


def test_blocks_rows_and_a_sentence_model_can_be_chosen(small: list[str], encoder: Path) -> None:
    chosen = (*small, "--range", "layer=1:2", "--evaluation-rows", "1")
    output = succeeded(*chosen, "--embedding-model", str(encoder), "--json", "l.json")
    prior = read_layer_prior(Path("l.json"))
    assert [one.layer for one in prior.layers] == [1, 2]
    assert prior.rows == 1
    assert "Similarity of 1 answers" in output
    assert f"in: {encoder}" in output.replace("\n", "")
    assert json.loads(Path("l.json").read_text())["embedding"] == str(encoder)
    own = (*chosen, "--json", "own.json", "--save", "l.svg", "--quiet")
    assert succeeded(*own) == ""
    assert prior.base_model.s1 != read_layer_prior(Path("own.json")).base_model.s1
    assert Path("l.svg").read_text(encoding="utf-8").startswith("<svg")


def test_everything_that_is_wrong_is_said_in_one_message_before_the_model_is_loaded(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lunar_tune.trial.worker.load_model", None)
    Path("folder").mkdir()
    message = refused(
        *(*small, "--fix", "coefficient=0", "--evaluation-rows", "0", "--range", "layer=1:9"),
        *("--save", "l.pdf", "--json", "folder", "--forget-edge", "X_Y"),
        *("--embedding-model", "./nosuch"),
    )
    for part in (
        *("coefficient=0", "--evaluation-rows 0", "layer 3, 4", "--save l.pdf"),
        *("--json folder", "'X_Y'", "--embedding-model ./nosuch: no such folder"),
    ):
        assert message.count(part) == 1, message
    assert message.startswith("error: 7 things are wrong:")


def test_nothing_but_a_range_of_layers_and_a_coefficient_is_taken(small: list[str]) -> None:
    texts = ("layer=1", "layer=0:1.5", "layer=0:1e12", "coefficient=1:2")
    for option, text in (
        *(("--range", text) for text in texts),
        *(("--fix", text) for text in ("coefficient=x", "coefficient=nan", "rank=4")),
        *((name, "1") for name in ("--factual-data", "--retain-rows", "--metrics", "--method")),
    ):
        assert option in refused(*small, option, text)


def test_on_the_tiny_model_adding_the_vector_turns_known_answers_into_refusals() -> None:
    """All its blocks can forget: each moves the answers away from the truth, towards refusals."""
    shown = succeeded("--fix", "coefficient=0.5", "--json", "l.json", "--device", "cpu")
    prior = read_layer_prior(Path("l.json"))
    assert (prior.model, prior.n_layers, prior.rows) == ("tiny", 4, 12)
    assert prior.base_model.s2 == pytest.approx(1, abs=0.1), "it knows what it is asked"
    for one in prior.layers:
        assert one.s1 > prior.base_model.s1
        assert one.s2 < prior.base_model.s2
    assert "I do not know" in shown
    assert json.loads(Path("l.json").read_text())["embedding"].startswith("own states")
