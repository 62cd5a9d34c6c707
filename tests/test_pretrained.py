"""Every call that opens a folder of somebody else says that no code of it may run, and the package has one module for
them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.training.run import Run

PACKAGE = Path(__file__).parent.parent
OPENS = ("from_pretrained", "from_config", "for_model")
HARMLESS = ("for_model", "PeftConfig.from_pretrained", "GenerationConfig.from_pretrained")
"""None of these can run code: a class of transformers by its name; files of settings."""


def calls(path: Path) -> Iterator[tuple[int, str, ast.Call]]:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = f"{ast.unparse(node.func.value)}.{node.func.attr}"
            if node.func.attr in OPENS or name.endswith("PeftModel.load_adapter"):
                yield node.lineno, name, node


def says_no(call: ast.Call) -> bool:
    return any(
        (word.arg == "trust_remote_code" and isinstance(word.value, ast.Constant) and word.value.value is False)
        or (word.arg is None and ast.unparse(word.value) in ("_HERE", "no_code"))
        for word in call.keywords
    )


def unsaid(path: Path) -> list[str]:
    harmless = (*HARMLESS, "PeftModel.from_pretrained")
    return [
        f"{path}:{line} {name}" for line, name, call in calls(path) if not name.endswith(harmless) and not says_no(call)
    ]


def test_the_package_opens_folders_through_one_module() -> None:
    for path in (PACKAGE / "src").rglob("*.py"):
        if path.name != "pretrained.py":
            assert [(str(path), line, name) for line, name, _ in calls(path)] == []


@pytest.mark.parametrize("folder", ["src/tunesmith", "benchmarks", "scripts", "examples"])
def test_every_call_that_could_run_code_says_that_it_may_not(folder: str) -> None:
    assert [fault for path in (PACKAGE / folder).rglob("*.py") for fault in unsaid(path)] == []


def test_the_script_in_an_adapters_folder_says_that_no_code_may_run(undisturbed: Run) -> None:
    assert unsaid(undisturbed.path / "adapter" / "load_and_chat.py") == []
    assert list(calls(undisturbed.path / "adapter" / "load_and_chat.py"))


def test_a_call_that_says_nothing_is_found(tmp_path: Path) -> None:
    """The check is shown a case that it must refuse."""
    path = tmp_path / "call.py"
    path.write_text("AutoTokenizer.from_pretrained(folder)\nAutoModel.from_config(c, trust_remote_code=None)\n")
    assert len(unsaid(path)) == 2
