"""Secrets in text that is shown or kept: logins in addresses, values of secret variables.

http://me:pass@host      ->  http://me:***@host
http://TOKEN@host        ->  http://***@host
/x?n=1;token=t#key=k     ->  /x?n=1;token=***#key=***
Authorization: Bearer t  ->  Authorization: Bearer ***
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from urllib.parse import quote

_HIDDEN = "***"
_SECRET_NAME = re.compile(  # RAY_AUTH_TOKEN_PATH is a place, MAX_NEW_TOKENS a number
    "^(?!.*(?:_PATH|_FILE|_DIR|(?:MAX|MIN|NUM)_(?:.*_)?TOKENS)$|.*TOKENIZER)"
    ".*(?:TOKEN|PASSWORD|PASSWD|PASSPHRASE|_PWD|SECRET|API_?KEY|ACCESS_?KEY|_KEY$|"
    "CONNECTION_STRING)",
    re.IGNORECASE,
)
_LEAST_SECRET = 6  # characters; a shorter one would blot out words
_HIDING = [
    (re.compile(pattern, re.IGNORECASE), rf"\1{_HIDDEN}\2")
    for pattern in (
        # Up to the last @ before a blank: a password may have one, and a path has so seldom.
        r"(://[^\s/:]*:)\S*(@)",
        r"(%3A%2F%2F(?:(?!%2F|%3A)\S)*%3A)\S*?(%40)",  # the same inside of another address
        # Before a server a name alone is a token; before a database or a bucket it is a name.
        r"(https?://)[^\s/:]+(@)(?![^\s/]*@)",
        r"([?&;#][^\s=&;#]*(?:token|pass|pwd|secret|key|signature|credential)[^\s=&;#]*=)"
        r"[^\s&;#'\"]+()",
        r"([?&;#](?:sig|auth|odbc_connect)=)[^\s&;#'\"]+()",
        r"(authorization['\"]?[:=] *['\"]?(?:\w+ +)?)[^\s'\",]+()",
        # Hugging Face's, GitHub's, GitLab's, Databricks', OpenAI's
        r"\b(hf_|gh[oprsu]_|github_pat_|glpat-|dapi|sk-)[\w-]{20,}()",
    )
]
_LOGIN = re.compile(r"://(?:[^\s/:]*:\S*|[^\s/]*)@")


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return text without passwords in addresses and without values of secret variables."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= _LEAST_SECRET and _SECRET_NAME.search(name):
            for written in (value, quote(value, safe="")):
                text = text.replace(written, _HIDDEN)
    for pattern, hidden in _HIDING:
        text = pattern.sub(hidden, text)
    return text


def without_password(address: str) -> str:
    """Return an address as it may be shown and kept: the same in every environment."""
    return without_secrets(address, {})


def is_masked(address: str) -> bool:
    """Say whether an address has lost its password, so that nobody can be reached with it."""
    return any(one in address for one in (f"://{_HIDDEN}@", f":{_HIDDEN}@", f"={_HIDDEN}"))


def without_login(address: str) -> str:
    """Return an address for a browser, which asks for user and password itself."""
    return without_password(_LOGIN.sub("://", address))


class SecretsFormatter(logging.Formatter):
    """Formats records of logging without secrets, of which no text makes another."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as it may be shown and kept, its traceback too."""
        from lunar_tune.display import visible

        return visible(without_secrets(super().format(record))).replace("\n", "\n  ")
