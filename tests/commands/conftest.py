"""A random model for commands that run to their end in this process."""

import pytest


@pytest.fixture(scope="session")
def small(small: list[str]) -> list[str]:
    """Return the options that every command takes."""
    return small[: small.index("--fix")]
