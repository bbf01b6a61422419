"""Bad input, a row a mistake: exit code 2 and one message, before anything is written.

What is wrong inside of a file of data, a space, a checkpoint or a goal is told by the tests of what
reads them; here is one of each, and what the machine or the command line itself lacks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from command_lines import refused, succeeded, without_ray
from file_server import serving

from lunar_tune.cli.ask import ask as ASK
from lunar_tune.cli.commands import Command
from lunar_tune.cli.describe import describe as DESCRIBE
from lunar_tune.cli.export import export as EXPORT
from lunar_tune.cli.main import reporting_errors
from lunar_tune.cli.search import search as SEARCH
from lunar_tune.cli.unlearn import unlearn as UNLEARN
from lunar_tune.errors import InputError, Problems

SETTING = ("layer=1", "coefficient=2", "learning_rate=0.01")
NO_SEARCH = (
    "nosuch: there is no such search. runs has no searches; name a search's folder, or start one"
)
TYPED = {
    "--data nosuch.json": "'nosuch.json' is neither a file nor a shipped name; there are: mini",
    "--reference-prompts nosuch.json": "nosuch.json",
    "--chat-template nosuch.jinja": "nosuch.jinja",
    "--forget-edge X_Y": "A_B",
    "--sampler grid": "unknown sampler 'grid'. There are: frontier, gp, tpe, random.",
    "--fix layer": "--fix layer: write NAME=VALUE",
    "--constrain retain_rouge1>=7": "retain_rouge1>=7",
    "--space nosuch": "--space nosuch: neither a file nor a shipped name.",
    "--space /dev/zero": "/dev/zero: cannot be read: it is a device or a pipe",
    "--tracking-uri bogus": "--tracking-uri bogus: must be an MLflow server such as http://host:5000",
    "--tracking-uri http://me:s3cretpw@": "--tracking-uri http://me:***@: must be an MLflow server",
    "--seed 99999999999999999999": "--seed 99999999999999999999: must be at most 4294967295.",
    "--trial-timeout 1e300": "--trial-timeout 1e+300: must be at most 100000000.",
    "--num-trials many": "--num-trials",
    "--name ../elsewhere": "--name ../elsewhere: must be a plain name, without folders.",
    "--output " + "x" * 300: "a name in it is longer than 255 bytes.",
    "--device tpu": "--device tpu: unknown.",
    "--address 127.0.0.1:1": "--address 127.0.0.1:1: nothing answers there (Connection",
    "--address head": "--address head: must be HOST:PORT or auto (the cluster",
    "--address ray://head:10001": "--address ray://head:10001: a search cannot run through Ray Cl",
    "--resume nosuch": NO_SEARCH,
}
GATED = "owner/gated"
MISTAKES: list[tuple[Command, str, str]] = [
    *((SEARCH, typed, message) for typed, message in TYPED.items()),
    (SEARCH, "--output file", "file is a file, not a folder."),
    (SEARCH, "--output fixed/runs", "fixed cannot be written."),
    (UNLEARN, f"{' '.join(SETTING)} --json fixed/scores.json", "fixed cannot be written."),
    (UNLEARN, "layer=9 coefficient=2 learning_rate=0.01", "4 decoder blocks"),
    (EXPORT, "nosuch --save out", NO_SEARCH),
    (ASK, "nosuch What?", NO_SEARCH),
    (DESCRIBE, "nosuch.json", "nosuch.json"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("command", "arguments", "expected"), MISTAKES, ids=[typed[:60] for _, typed, _ in MISTAKES]
)
def test_a_mistake_ends_in_its_message(
    command: Command, arguments: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a file, and a folder that cannot be written by whoever runs the tests (root can)."""
    Path("file").touch()
    Path("fixed").mkdir()
    access = os.access
    monkeypatch.setattr(
        "os.access", lambda place, mode: "fixed" not in str(place) and access(place, mode)
    )
    before = sorted(Path.cwd().rglob("*"))
    message = refused(command, *arguments.split())
    assert expected in message
    assert "things are wrong" not in message, "one mistake is one message"
    assert sorted(Path.cwd().rglob("*")) == before, "nothing was written"


def test_a_question_longer_than_the_context_is_refused_without_its_text(small: list[str]) -> None:
    """The model's context is 1,024 tokens; a byte of this text is a token at least once in four."""
    rows = [{"edge": edge, "question": "What?", "answer": "Tea"} for edge in ("A_B", "B_C")]
    rows[1]["question"] = "Zq9 " * 2000
    Path("pairs.json").write_text(json.dumps(rows))
    message = refused(UNLEARN, *small, "--data", "pairs.json", *SETTING)
    assert "1 rows are longer than the context of " in message
    assert ", 1024 tokens; the longest has " in message
    assert "(8000 characters of text). Shorten or remove them." in message
    assert "Zq9" not in message


def test_gated_weights_say_where_to_accept_the_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries ask a server on this machine that hands out nothing without a licence."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path.cwd().parent / "hub"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        server.status[f"/{GATED}/resolve/main/config.json"] = 403
        server.headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        named = ("--model", GATED, "--data", "mini")
        message = refused(UNLEARN, *named, *SETTING, "--device", "cpu")
    assert f"model {GATED}: the hub asks for an accepted licence. Accept it on the" in message
    assert "then run `hf auth login` or set HF_TOKEN." in message


def test_everything_that_is_wrong_is_said_in_one_message() -> None:
    """Mistakes of a configuration from different corners, each said once."""
    mistakes = [
        *("--forget-edge X_Y", "--chat-template nosuch.jinja", "--address head"),
        *("--output " + "x" * 300, "--constrain retain_rouge1>=7", "--sampler grid"),
        *("--fix layer", "--reference-prompts nosuch.json"),
    ]
    more = "--space nosuch --num-trials 0 --device cpu --gpus-per-trial 1"
    message = refused(SEARCH, *" ".join([*mistakes, more]).split())
    assert message.startswith(f"error: {message.count(chr(10) + '  - ')} things are wrong:")
    assert message.count("things are wrong") == 1
    for expected in (
        *(TYPED[typed] for typed in mistakes),
        "--num-trials 0",
        "--device cpu contradicts --gpus-per-trial 1: leave one out.",
    ):
        assert expected in message  # but for the space, which waits for the data it is for


def test_what_was_not_foreseen_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Mock(side_effect=KeyError("a mistake\nof the program"))
    monkeypatch.setattr(Problems, "raise_if_any", broken)
    result = without_ray(SEARCH, "--dry-run")
    assert result.exit_code == 1
    assert result.stderr == (
        "unexpected error: KeyError: 'a mistake\\nof the program' (run the command again with "
        "--debug to see where; if this is a bug of lunar-tune, please report it)\n"
    )
    traced = without_ray(SEARCH, "--dry-run", "--debug")
    assert traced.exit_code == 1
    trace, said = traced.stderr.split("unexpected error: ")
    assert trace.startswith("Traceback (most recent call last):\n")
    assert trace.endswith("KeyError: 'a mistake\\nof the program'\n")
    assert "--debug" not in said


@pytest.mark.parametrize("debug", [False, True], ids=["a message", "a traceback"])
@pytest.mark.parametrize("kind", [InputError, RuntimeError])
def test_no_error_tells_a_password(
    kind: type[Exception], debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = "API request to http://me:s3cretpw@host:5000/api failed"
    with pytest.raises(SystemExit), reporting_errors(debug=debug):
        raise kind(failed)
    shown = capsys.readouterr().err
    assert shown.count("API request to http://me:***@host:5000/api failed") == 1 + debug
    assert "s3cret" not in shown


def test_quiet_shows_errors_only() -> None:
    assert succeeded(SEARCH, "--quiet", "--dry-run") == ""
    assert "retain_rouge1>=7" in refused(SEARCH, "--quiet", "--constrain", "retain_rouge1>=7")


def test_a_name_that_is_taken_is_refused_even_by_a_dry_run() -> None:
    Path("out/n").mkdir(parents=True)
    Path("out/n/anything").touch()
    message = refused(SEARCH, "--output", "out", "--name", "n", "--dry-run")
    assert "--name n: out/n exists already" in message


def test_a_dry_run_shows_the_plan_and_writes_nothing() -> None:
    options = ("--model", "qwen2.5-7b", "--num-trials", "7", "--seed", "1")
    shown = succeeded(SEARCH, "--dry-run", *options)
    for part in (
        "qwen2.5-7b",
        "general: forget chemical_symbols (up to 30",
        "7, sampler frontier",
        "lunar (adamw)",
    ):
        assert part in shown
    assert list(Path.cwd().iterdir()) == []


def test_a_dry_run_shows_the_first_prompts_unless_texts_are_not_to_be_seen(
    small: list[str], tmp_path: Path
) -> None:
    options = ("--dry-run", "--in-process", *small)
    shown = succeeded(SEARCH, *options)
    for part in (
        "forget prompt     <|bos|><|im_start|>user\\n",
        "reference prompt  … ",
        "[answer]",
    ):
        assert part in shown
    assert " prompt  " not in succeeded(SEARCH, *options, "--no-text")
    (tmp_path / "mine.jinja").write_text("{{ raise_exception('no such turn') }}")
    message = refused(SEARCH, *options, "--chat-template", tmp_path / "mine.jinja")
    assert "failed: no such turn" in message


def test_a_dry_run_looks_at_a_store_and_leaves_it_as_it_is(
    empty_store: Callable[[Path], Path],
) -> None:
    store = empty_store(Path.cwd() / "runs" / "mlflow.db")
    content = store.read_bytes()
    shown = " ".join(succeeded(SEARCH, "--dry-run", "--in-process").split())
    for part in (
        "runs can be written",
        "answers; experiment lunar-tune, to be created",
        "one trial",
    ):
        assert part in shown
    assert (store.read_bytes(), [*store.parent.iterdir()]) == (content, [store])
    store.write_bytes(b"no database")
    broken = refused(SEARCH, "--dry-run")
    assert "mlflow.db cannot be used: file is not a database" in broken
