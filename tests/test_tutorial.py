"""docs/tutorial.ipynb: runs from the first cell to the last."""

import json
import shutil

import pytest
from conftest import ROOT


def test_the_notebook_is_stored_without_outputs():
    notebook = json.loads((ROOT / "docs/tutorial.ipynb").read_text("utf-8"))
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}, cell["id"]


@pytest.mark.slow
def test_the_notebook_runs_whole_in_a_fresh_copy(tmp_path, monkeypatch):
    """It starts in docs/, as Jupyter starts it, and trains for one epoch. RESULTS.md has the S-measures after six."""
    import nbclient
    import nbformat

    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "weights", "runs", "results", "demo")
    copy = shutil.copytree(ROOT, tmp_path / "a copy", ignore=ignored)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    text = (copy / "docs/tutorial.ipynb").read_text("utf-8")
    assert text.count("--epoch 6 ") == 1
    notebook = nbformat.reads(text.replace("--epoch 6 ", "--epoch 1 "), as_version=4)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(copy / "docs")}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = {cell.id: [output.get("data", {}) for output in cell.outputs] for cell in cells}
    for ident in ("pairs", "loss", "overlays", "worst"):
        assert sum("image/png" in data for data in shown[ident]) == 1
    scores = json.loads((copy / "runs/tutorial/results/results.json").read_text())
    assert scores["tutorial"]["images"] == 40 and scores["tutorial"]["Smeasure"] > 0.5
