"""The examples run as they are, on the real demo model."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT


# zmq and the kernel's client are third parties' event loops
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning")
def test_the_quickstart_notebook_runs_and_the_model_learns_its_name(smollm2: Path) -> None:
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    os.environ["TUNESMITH_OFFLINE"] = "1"
    try:
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    finally:
        del os.environ["TUNESMITH_OFFLINE"]
    printed = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert "Did you mean lora.r?" in printed[1]
    assert "16 rows read, 16 trainable, 0 faults" in printed[2]
    before, after = printed[4].split("after: ")
    assert "Hester" not in before
    assert "Hester Quill" in after
    assert "stopped by stop" in after
