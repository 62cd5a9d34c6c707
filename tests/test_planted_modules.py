"""What lies in the folder at hand is data: no file in it is ever run."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from small_runs import flags_of
from tunesmith import runs

PACKAGES = ("accelerate", "filelock", "jinja2", "numpy", "peft", "psutil", "pyarrow", "pydantic", "rich", "safetensors")
MORE = ("sitecustomize", "tokenizers", "torch", "transformers", "typer", "usercustomize", "yaml")


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder with a file for every module that Python or we could look for; what is run is written into RAN."""
    folder = tmp_path / "planted"
    folder.mkdir()
    names = {name for name in sys.stdlib_module_names if not name.startswith("_")} | {*PACKAGES, *MORE}
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'RAN')!r}, 'a').write({name!r} + ' ')\n")
    return folder


def ran(folder: Path) -> str:
    return (folder / "RAN").read_text() if (folder / "RAN").exists() else ""


def run(planted: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TUNESMITH_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=planted, env=env, capture_output=True, text=True, timeout=300, check=False)


SCRIPT = str(Path(sys.executable).with_name("tunesmith"))


def test_python_would_run_them(planted: Path) -> None:
    run(planted, sys.executable, "-c", "import yaml")
    assert "yaml" in ran(planted)


def test_a_detached_training_runs_none(tiny_model: Path, talk: Path, planted: Path, tmp_path: Path) -> None:
    arguments = [*flags_of(tiny_model, talk, **{"train.epochs": 1}), "--out", str(tmp_path / "run"), "--detach"]
    started = run(planted, SCRIPT, "train", *arguments)
    assert started.returncode == 0, started.stderr
    assert json.loads(started.stdout)["pid"]
    until = time.monotonic() + 200
    while runs.state_of(tmp_path / "run").state == "running" and time.monotonic() < until:
        time.sleep(0.2)
    assert runs.state_of(tmp_path / "run").state == "done"
    assert ran(planted) == ""


def test_python_with_our_name_runs_none_of_what_it_has_not_imported_by_then(planted: Path) -> None:
    """It looks into the folder at hand first; ours, which it finds before it needs any of these, takes that out."""
    for path in planted.glob("*.py"):
        if path.stem not in (*PACKAGES, *MORE, "json", "random", "statistics", "tempfile"):
            path.unlink()
    ended = run(planted, sys.executable, "-m", "tunesmith", "models", "--json")
    assert json.loads(ended.stdout)["models"], ended.stderr
    assert ran(planted) == ""


def test_every_python_that_we_start_leaves_the_folder_at_hand_out() -> None:
    started = 0
    for path in [path for name in ("src", "benchmarks", "scripts", "tests") for path in (ROOT / name).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.List | ast.Tuple):
                continue
            words = [ast.unparse(word) for word in node.elts]
            if "sys.executable" not in words:
                continue
            first, *more = words[words.index("sys.executable") + 1 :] or [""]
            ours = path.parts[len(ROOT.parts)] != "tests" or "'tunesmith'" in more
            if ours and first in ("'-m'", "'-c'", "'-P'") and path.name != Path(__file__).name:
                assert first == "'-P'", f"{path}:{node.lineno}"
                started += 1
    assert started >= 12
