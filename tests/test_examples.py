"""The examples run as they are, on the real demo model, and what they have kept is what they show."""

from __future__ import annotations

import os
import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from conftest import ROOT
from warm import BEFORE_IMPORTS

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "run_notebook.py"))
KEPT = nbformat.read(SCRIPT["NOTEBOOK"], as_version=4)
# zmq and the kernel's client are third parties' event loops
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebook was run."""
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def ran(smollm2: Path, folder: Path) -> nbformat.NotebookNode:
    return SCRIPT["executed"](folder, TUNESMITH_OFFLINE="1", OMP_NUM_THREADS="1")


def outputs(notebook: nbformat.NotebookNode) -> list[list[Any]]:
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell shows, as text."""
    return ["\n".join(o.get("text") or o.data["text/plain"] for o in cell) for cell in outputs(notebook)]


def comparable(text: str) -> str:
    """Without what depends on the machine: numbers, and what the model says before and after."""
    text = re.sub(r"(before|after): .*?(?=after: |stopped by)", r"\1 ", text, flags=re.DOTALL)
    return re.sub(r"\d+([.:]\d+)*", "0", text)


def test_the_quickstart_notebook_runs_and_the_model_learns_its_name(ran: nbformat.NotebookNode) -> None:
    shown = texts(ran)
    assert "Did you mean lora.r?" in shown[1]
    assert "12 read = 12 to train on + 0 to hold out + 0 to set aside; ok" in shown[2]
    before, after = shown[5].split("after: ")
    assert "Hester" not in before
    assert "Hester Quill" in after
    assert "stopped by stop" in after


def test_the_notebook_has_kept_what_it_shows(ran: nbformat.NotebookNode) -> None:
    assert [*map(comparable, texts(KEPT))] == [*map(comparable, texts(ran))]
    kinds = [[sorted(o.get("data", {"text": o.get("name")})) for o in cell] for cell in outputs(KEPT)]
    assert kinds == [[sorted(o.get("data", {"text": o.get("name")})) for o in cell] for cell in outputs(ran)]
    assert "Hester Quill" in str(outputs(KEPT)[4])  # the answers after training, in the run's own table


def test_the_kept_notebook_is_small_and_says_nothing_of_a_machine() -> None:
    whole = SCRIPT["NOTEBOOK"].read_text(encoding="utf-8")
    assert len(whole) < 60_000
    for word in ("/tmp", "/home", "/root", "/Users", "GiB", *([platform.node()] if len(platform.node()) > 8 else [])):
        assert word not in whole
    code = [cell for cell in KEPT.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert all(cell.outputs and not cell.metadata for cell in code)


def test_nothing_is_printed_beside_what_the_notebook_shows(ran: nbformat.NotebookNode) -> None:
    """No warning of a library, no bar."""
    assert [o.name for cell in outputs(ran) for o in cell if o.output_type == "stream" and o.name != "stdout"] == []
    assert [len(cell) for cell in outputs(ran)] == [1, 1, 1, 1, 2, 1, 1]


def test_the_script_beside_the_adapter_prints_the_answer_alone(
    ran: nbformat.NotebookNode, folder: Path, smollm2: Path
) -> None:
    script = folder / "runs" / "rows-smollm2" / "adapter" / "load_and_chat.py"
    libraries_speak = {k: v for k, v in os.environ.items() if k not in BEFORE_IMPORTS} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), "--base", str(smollm2), "Hello, and who might you be?"]
    asked = subprocess.run(command, capture_output=True, text=True, env=libraries_speak, check=False)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.strip() == texts(ran)[5].split("after:  ")[1].split("\nstopped by")[0]
