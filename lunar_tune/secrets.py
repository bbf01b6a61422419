"""Secrets in text that is shown or kept: passwords in addresses, values of secret variables.

http://me:pass@host  ->  http://me:***@host
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_HIDDEN = "***"
_SECRET_NAME = re.compile("TOKEN|PASSWORD|PASSWD|_PWD|SECRET|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_LEAST_SECRET = 6  # characters; a shorter one would blot out words
# Up to the last @ before a blank: a password may have one, and a path has so seldom.
_PASSWORD = re.compile(r"(://[^\s/:]*):\S*@")
_QUERY = re.compile(
    r"([?&][^\s=&]*(?:token|pass|pwd|secret|key)[^\s=&]*=)[^\s&'\"]+", re.IGNORECASE
)
_LOGIN = re.compile(r"://(?:[^\s/:]*:\S*|[^\s/]*)@")


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return text without passwords in addresses and without values of secret variables."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= _LEAST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, _HIDDEN)
    text = _PASSWORD.sub(rf"\1:{_HIDDEN}@", text)
    return _QUERY.sub(rf"\1{_HIDDEN}", text)


def without_password(address: str) -> str:
    """Return an address as it may be shown and kept: the same in every environment."""
    return without_secrets(address, {})


def is_masked(address: str) -> bool:
    """Say whether an address has lost its password, so that nobody can be reached with it."""
    return f":{_HIDDEN}@" in address or f"={_HIDDEN}" in address


def without_login(address: str) -> str:
    """Return an address for a browser, which asks for user and password itself."""
    return without_password(_LOGIN.sub("://", address))
