"""Files: names stay in their folder, no half file is seen, no secret is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from made_outcomes import losses_of, trial_result
from pages_by_hand import said

from lunar_tune import files
from lunar_tune.bounded import bounded
from lunar_tune.errors import InputError
from lunar_tune.secrets import is_masked, without_login, without_password, without_secrets
from lunar_tune.study.folder import Folder, read_answers, write_result
from lunar_tune.trial.worker import TrialResult


@given(st.text(max_size=30))
@example("../../etc/passwd")
@example("..")
@example("a\x00b")
@example("/")
def test_a_safe_name_is_one_part_of_a_path_and_hides_nothing(text: str) -> None:
    name = files.safe_name(text)
    assert (Path("/out") / name).parent == Path("/out")
    assert Path(name).name == name
    assert not name.startswith((".", "-"))
    assert name.isascii()
    assert name.isprintable()
    assert files.safe_name(name) == name


def test_a_new_cache_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "a" / "cache"
    monkeypatch.setenv(files.CACHE_VARIABLE, str(cache))
    assert files.cache_dir().stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    with pytest.raises(InputError, match="cache can be written by every user, who could replace"):
        files.cache_dir()
    cache.chmod(0o775)
    assert files.cache_dir() == cache
    assert cache.stat().st_mode & 0o777 == 0o775, "who shares a folder that was there is not asked"
    for owner, mode, user, problem in (
        (1000, 0o755, 1000, None),
        (1000, 0o777, 1000, "can be written by every user"),
        (1001, 0o755, 1000, "belongs to another user"),
        (0, 0o775, 1000, None),
        (1001, 0o755, 0, None),
    ):
        assert files.mistrusted(owner, mode, user) == problem


def test_names_that_no_system_takes_are_no_file_and_no_place_to_write(tmp_path: Path) -> None:
    for name in ("x" * 300, "x" * 5000, "a\x00b"):
        assert not files.is_file(tmp_path / name)
        assert not files.is_folder(tmp_path / name)
    with pytest.raises(InputError, match="--output: a name in it is longer than 255 bytes"):
        files.check_writable(tmp_path / ("é" * 128) / "runs", "--output")
    files.check_writable(tmp_path / ("é" * 127) / "runs", "--output")


def test_a_written_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "new" / "scores.json"
    files.write_json(target, {"b": [1], "a": "ü\udcff"})
    assert list(json.loads(target.read_bytes().decode(errors="surrogatepass"))) == ["b", "a"]
    before = target.read_bytes()
    with suppress(KeyError), files.replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_bytes() == before
    assert list(target.parent.iterdir()) == [target]
    (tmp_path / "usual").touch()
    assert target.stat().st_mode == (tmp_path / "usual").stat().st_mode


def result_of(*, fitted: bool = True, **answers: str) -> TrialResult:
    made = trial_result(0.2, 0.9)
    rows = tuple(said("forget", question, answer, 0.0) for question, answer in answers.items())
    evaluation = dataclasses.replace(made.evaluation, rows=rows)
    return dataclasses.replace(made, evaluation=evaluation, losses=made.losses if fitted else ())


def test_each_evaluation_has_a_file_of_its_own_and_a_later_one_wins(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    write_result(folder.answers(None), result_of(fitted=False, first="base"))
    write_result(folder.answers(None, full=True), result_of(fitted=False, first="held"))
    digest = write_result(folder.answers(7), result_of(first="trial", second="more"))
    assert write_result(folder.answers(7, full=True), result_of(first="draft")) != digest
    write_result(folder.answers(7, full=True), result_of(first="full"))
    write_result(folder.answers(8), result_of(secretive="kettles"), text=False)
    assert b"kettles" not in folder.answers(8).read_bytes()
    assert digest == hashlib.sha256(folder.answers(7).read_bytes()).hexdigest()
    assert {
        path.name: ([row.answer for row in read_answers(path)], losses_of(path))
        for path in (folder.path / "trials").iterdir()
    } == {
        "baseline.parquet": (["base"], ()),
        "baseline-full.parquet": (["held"], ()),
        "00007.parquet": (["trial", "more"], (2.0, 1.0)),
        "00007-full.parquet": (["full"], (2.0, 1.0)),
        "00008.parquet": ([""], (2.0, 1.0)),
    }


def test_secrets_are_left_out() -> None:
    environment = {"HF_TOKEN": "hf_verysecret", "MY_PASSWORD": "a", "PWD": "/root/here"}
    environment |= {"MAX_NEW_TOKENS": "131072", "HF_TOKEN_PATH": "/cache/token"}
    environment |= {"AWS_ACCESS_KEY_ID": "AKIA1234", "TOKENIZER": "gpt2-xl", "API_TOKENS": "t0k3n5"}
    environment |= {"MYSQL_PWD": "s3cretpwd", "KAGGLE_KEY": "s3cret/pw"}
    for text, expected in (
        ("mysql+pymysql://me:p@ss/w:rd@host/db and", "mysql+pymysql://me:***@host/db and"),
        ("http://me@home.org:pass@host", "http://me@home.org:***@host"),
        ("https://host/x?access_token=abc&n=1", "https://host/x?access_token=***&n=1"),
        ("/x;token=abc;n=1#access_token=def&n=2 is", "/x;token=***;n=1#access_token=***&n=2 is"),
        ("s3://me:abc@host/x?X-Amz-Signature=a", "s3://me:***@host/x?X-Amz-Signature=***"),
        ("wasbs://c@host/x?sv=1&sig=a%2Fb", "wasbs://c@host/x?sv=1&sig=***"),
        ("mssql:///?odbc_connect=D%3BPWD%3Da&n=1", "mssql:///?odbc_connect=***&n=1"),
        ("E;AccountName=me;AccountKey=ab==;n=1", "E;AccountName=me;AccountKey=***;n=1"),
        ("git+https://abc@host/x", "git+https://***@host/x"),
        ("?to=http%3A%2F%2Fme%3Aabc%40host%2Fx", "?to=http%3A%2F%2Fme%3A***%40host%2Fx"),
        ("{'Authorization': 'Basic bWU6YWJj', 'n': 1}", "{'Authorization': 'Basic ***', 'n': 1}"),
        ("token hf_aBcDeFgHiJkLmNoPqRsTuVw is invalid", "token hf_*** is invalid"),
        ("Bearer hf_verysecret, s3cretpwd! s3cret%2Fpw", "Bearer ***, ***! ***"),
        ("AKIA1234 t0k3n5", "*** ***"),
        *(2 * (same,) for same in ("131072 tokens", "/cache/token is", "gpt2-xl has")),
        *(2 * (same,) for same in ("http://127.0.0.1:5000 is", "sqlite:////tmp/a", "a /root/here")),
        *(2 * (same,) for same in ("postgresql://me@host/db?n=1", "sftp://me@host", "tokens=4")),
    ):
        assert without_secrets(text, environment) == expected


@given(password=st.text("@/:?#'\"&=%.", min_size=1))
def test_whatever_signs_a_password_has_none_is_left(password: str) -> None:
    address = f"http://me:{password}secret{password}@host:5000/x"
    hidden = "http://me:***@host:5000/x"
    assert without_password(address) == hidden
    assert without_secrets(f"to {address} failed", {}) == f"to {hidden} failed"
    assert without_login(address) == "http://host:5000/x"
    assert is_masked(hidden)
    assert is_masked("postgresql://host/db?password=***")
    assert is_masked(without_password("http://token@host"))
    assert without_login("http://token@host/x") == "http://host/x"
    assert not is_masked("sqlite:////tmp/***.db")
    assert without_password(hidden) == hidden


def test_a_call_in_a_child_says_how_it_ended_and_a_worker_of_a_pool_calls_itself() -> None:
    assert bounded(lambda: [1, "a"], seconds=5) == [1, "a"]
    for call, reason in (
        (lambda: 1 / 0, "division by zero"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"ended its process \(exit code -11\)"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            bounded(call, seconds=5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(partial(bounded, os.getpid, seconds=5)) != os.getpid()
