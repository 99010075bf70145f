"""The tutorial notebook runs as it stands."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path(__file__).resolve().parent.parent / "docs" / "tutorial.ipynb"


@pytest.mark.timeout(900)
def test_the_tutorial_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    # It trains in earnest, so that a little optimising pays (see .ci/run); more does not.
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", flags.replace("optimization_level=0", "optimization_level=1"))
    notebook = nbformat.read(TUTORIAL, 4)
    NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    values = [_value(cell) for cell in cells]
    scores = next(value for value in values if isinstance(value, dict))
    assert scores["neural mixture"] > scores["k-means on the pixels"] > 0.75
    assert next(value for value in values if isinstance(value, float)) > 0.8
    assert values[-1] is True
    pictures = [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 3


def _value(cell):
    texts = [
        out["data"]["text/plain"] for out in cell.outputs if out.output_type == "execute_result"
    ]
    try:
        return ast.literal_eval(texts[0]) if texts else None
    except (SyntaxError, ValueError):
        return texts[0]
