"""Secrets in text: hidden wherever they may stand in an address, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lunar_tune.secrets import is_masked, without_login, without_password, without_secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:pass@host/db", "postgresql://me:***@host/db"),
        ("mysql+pymysql://me:p@ss/w:rd@host/db and", "mysql+pymysql://me:***@host/db and"),
        ("http://me@home.org:pass@host", "http://me@home.org:***@host"),
        ("http://me:it's@host", "http://me:***@host"),
        ("https://:pass@host", "https://:***@host"),
        ("postgresql+psycopg2://u:p%40ss@db/x", "postgresql+psycopg2://u:***@db/x"),
        ("http://127.0.0.1:5000 is open", "http://127.0.0.1:5000 is open"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("https://host/x?access_token=abc&n=1", "https://host/x?access_token=***&n=1"),
        ("postgresql://host/db?user=me&password=abc", "postgresql://host/db?user=me&password=***"),
        ("Bearer hf_verysecret!", "Bearer ***!"),
        ("a short value stays", "a short value stays"),
    ],
)
def test_secrets_are_left_out(text: str, expected: str) -> None:
    environment = {"HF_TOKEN": "hf_verysecret", "MY_PASSWORD": "a", "HOME": "/root/stays"}
    environment |= {"MYSQL_PWD": "s3cretpwd", "DB_PASSWD": "s3cretpasswd", "PWD": "/root/here"}
    assert without_secrets(text, environment) == expected


@given(password=st.text("@/:?#'\"&=%.", min_size=1))
def test_whatever_signs_a_password_has_none_is_left(password: str) -> None:
    address = f"http://me:{password}secret{password}@host:5000/x"
    hidden = "http://me:***@host:5000/x"
    assert without_password(address) == hidden
    assert without_secrets(f"API request to {address} failed", {}) == (
        f"API request to {hidden} failed"
    )
    assert without_login(address) == "http://host:5000/x"
    assert without_password(hidden) == hidden


@pytest.mark.parametrize(
    ("address", "masked"),
    [
        ("http://me:***@host:5000", True),
        ("postgresql://host/db?password=***", True),
        ("http://me:secret@host:5000", False),
        ("sqlite:////tmp/***.db", False),
    ],
)
def test_an_address_that_has_lost_its_password_is_known(address: str, masked: bool) -> None:
    assert is_masked(address) == masked
    assert is_masked(without_password(address)) == (masked or "secret" in address)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://me:***@host:5000", "http://host:5000"),
        ("http://me@host", "http://host"),
        ("http://127.0.0.1:5000/x", "http://127.0.0.1:5000/x"),
    ],
)
def test_a_browser_is_given_no_login(address: str, shown: str) -> None:
    assert without_login(address) == shown
