"""The command line that scores layers: table, files, mistakes, and the tiny model as a user has it.

Covers: a random model in this process; `tiny` in a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from command_lines import run_command
from matplotlib.image import imread
from random_models import build_encoder
from typer.testing import CliRunner

from lunar_tune.cli.layer_lists import read_layers, show_layers
from lunar_tune.cli.layers import layers
from lunar_tune.cli.running import command_app
from lunar_tune.errors import InputError
from lunar_tune.trial.layer_prior import read_layer_prior


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def invoke(*arguments: str) -> Result:
    environment = {"COLUMNS": "160", "TERM": "dumb"}
    return CliRunner().invoke(command_app(layers), list(arguments), env=environment)


def refused(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


def succeeded(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_help_names_the_options() -> None:
    words = succeeded("--help").replace("│", " ").split()
    wanted = "--model --coefficient --layers --embedding-model --rows --json --plot --refusals "
    wanted += "--data --forget-edge --reference-prompts --max-new-tokens --quiet"
    assert [option for option in wanted.split() if option not in words] == []


def test_a_run_prints_a_table_and_writes_what_it_was_asked_for(small: list[str]) -> None:
    output = succeeded(*small, "--json", "new/l.json", "--plot", "l.png", "--coefficient", "0.5")
    prior = read_layer_prior(Path("new/l.json"))
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}

    assert [one.layer for one in prior.layers] == [0, 1, 2]
    assert (prior.rows, prior.max_new_tokens, prior.coefficient) == (3, 4, 0.5)
    for one in prior.layers:
        cells = lines[str(one.layer)]
        assert cells[1:5] == [
            *(f"{value:.3f}" for value in (one.s1, one.s2, one.score)),
            f"{one.unfinished}/3",
        ]
        assert (cells[5] == "best") is (one.layer == prior.best)
    assert lines["none"][3] == f"{prior.unmodified.score:.3f}"
    assert f"recommended: {show_layers(prior.recommended)} " in output
    assert imread("l.png")[..., :3].std() > 0.03
    for line in ("scores written to new/l.json", "picture written to l.png"):
        assert line in output


def test_options_without_a_part_in_it_are_named(small: list[str]) -> None:
    metrics = ("--metrics", "refusal_quality")
    output = succeeded(*small, "--layers", "0", "--rows", "1", "--retain-rows", "2", *metrics)
    (line,) = [line for line in output.splitlines() if line.startswith("not used here")]
    assert set(line.removeprefix("not used here: ").split(", ")) == {
        *("--factual-data", "--epochs", "--retain-rows", "--metrics")
    }


def test_nothing_is_shown_when_quiet(small: list[str]) -> None:
    assert succeeded(*small, "--quiet", "--plot", "l.svg") == ""
    assert Path("l.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_everything_that_is_wrong_is_said_in_one_message(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded."""

    def load(*_arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lunar_tune.trial.worker.load_model", load)
    Path("folder").mkdir()
    message = refused(
        *(*small, "--coefficient", "0", "--rows", "0", "--layers", "1-9", "--plot", "l.pdf"),
        *("--json", "folder", "--forget-edge", "X_Y"),
    )
    for part in (
        *("--coefficient 0.0", "--rows 0", "--layers 3, 4", "--plot l.pdf", "--json folder"),
        "'X_Y'",
    ):
        assert message.count(part) == 1, message
    assert message.startswith("error: 6 things are wrong:")


def test_methods_that_have_no_layers_are_refused(small: list[str]) -> None:
    place = small.index("--epochs")
    without = (*small[:place], *small[place + 2 :])
    assert "--method npo: has no unlearning vector" in refused(*without, "--method", "npo")
    assert "unknown" in refused(*without, "--method", "nosuch")


def test_a_sentence_model_that_is_not_there_is_refused_with_what_else_is_wrong(
    small: list[str],
) -> None:
    message = refused(*small, "--embedding-model", "./nosuch", "--rows", "0")
    assert "--embedding-model ./nosuch: no such folder" in message
    assert "--rows 0" in message


def test_a_sentence_model_compares_the_answers_instead(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    encoder = str(build_encoder(tmp_path / "encoder"))
    output = succeeded(*small, "--embedding-model", encoder, "--json", "l.json")
    prior = read_layer_prior(Path("l.json"))
    assert f"in: {encoder}" in output.replace("\n", "")
    assert json.loads(Path("l.json").read_text())["embedding"] == encoder
    succeeded(*small, "--json", "own.json")
    assert prior.unmodified.s1 != read_layer_prior(Path("own.json")).unmodified.s1


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [
        ("0", (0,), "0"),
        ("0-3,5", (0, 1, 2, 3, 5), "0-3,5"),
        ("2, 4-4, 6-7", (2, 4, 6, 7), "2,4,6-7"),
        ("1,1-2", (1, 2), "1-2"),
    ],
)
def test_lists_of_layers_are_read_and_shown(
    text: str, expected: tuple[int, ...], shown: str
) -> None:
    assert read_layers(text, "--layers") == expected
    assert show_layers(expected) == shown
    assert read_layers(shown, "--layers") == expected


@pytest.mark.parametrize(
    "text", ["", "a", "1-", "-1", "1--2", "3-1", "1.5", "1,", "0-99999999", "²"]
)
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--layers"):
        read_layers(text, "--layers")


def test_on_the_tiny_model_adding_the_vector_turns_known_answers_into_refusals(
    tmp_path: Path,
) -> None:
    """All its blocks can forget: each moves the answers away from the truth, towards refusals."""
    arguments = ("--coefficient", "0.5", "--json", "l.json", "--plot", "l.png", "--device", "cpu")
    done = run_command("layers", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    prior = read_layer_prior(tmp_path / "l.json")
    assert (prior.model, prior.n_layers, prior.rows) == ("tiny", 4, 12)
    assert prior.unmodified.s2 == pytest.approx(1, abs=0.1), "it knows what it is asked"
    for one in prior.layers:
        assert one.s1 > prior.unmodified.s1
        assert one.s2 < prior.unmodified.s2
    assert "I do not know" in done.stdout
    assert "python -m" not in done.stderr
    assert json.loads((tmp_path / "l.json").read_text())["embedding"].startswith("own states")
