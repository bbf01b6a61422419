"""Data for single tasks and questions."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file of two questions for each of three edges."""
    rows = [
        {"edge": edge, "question": f"What of {edge}, {n}?", "answer": f"Kettles {n}."}
        for edge in ("A_B", "B_C", "C_D")
        for n in range(2)
    ]
    file = tmp_path_factory.mktemp("data") / "pairs.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return str(file)
