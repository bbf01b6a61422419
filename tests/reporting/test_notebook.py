"""The notebook that comes with the project, in a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "first_search.ipynb"


@pytest.mark.slow
def test_the_first_search_runs_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Callable[[Path], Path]
) -> None:
    empty_store(tmp_path / "runs" / "mlflow.db")
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "stored without outputs"
    assert "num_trials = 8" in cells[0].source
    cells[0].source = cells[0].source.replace("num_trials = 8", "num_trials = 2")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # tqdm's, where there are no widgets
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    shown = {cell.source: [one for one in cell.outputs if "data" in one] for cell in cells}
    (searched,) = (shown[cell.source] for cell in cells if "lt.search(" in cell.source)
    lines = [one["data"]["text/plain"] for one in searched]
    assert sum("2/2 " in line for line in lines) == 1, "each line is shown once"
    assert "2 trials" in lines[-1]
    html = [one["data"].get("text/html", "") for cell in cells for one in shown[cell.source]]
    assert any("vegaEmbed" in text for text in html)
    assert "unlearned" in shown[cells[-2].source][-1]["data"]["text/plain"]
    assert "checkpoint, proven: " in shown[cells[-1].source][-1]["data"]["text/plain"]
    (model,) = tmp_path.glob("runs/*/model/model.safetensors")
    assert model.stat().st_size > 0
