"""The browser that tests drive, if there is one."""

from __future__ import annotations

import os
import shutil


def chromium() -> str | None:
    """Return its path: Debian's Chromium, or what CHROMIUM names."""
    return (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
