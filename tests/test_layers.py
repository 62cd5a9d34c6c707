"""The picture of the layers in docs/design.md stays true: nobody imports what lies above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "tunesmith"
# From the top down; a module may import those of its own line and of the lines below.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"cli.following", "cli.machine", "cli.tuning", "cli.using"},
    {"cli.training"},
    {"cli.console", "cli.onward"},
    {"cli.helping", "cli.usage"},
    {"cli.options"},
    {"display", "talk", "questions", "doctor", "evaluation_page", "judging"},
    {"demo", "evaluate", "tune", "tuning_page", "serving.server"},
    {"export", "serving.app"},
    {"export.llama", "export.merged", "export.ollama", "serving.answers"},
    {"export.gguf_file", "export.live", "serving.asked", "serving.metrics", "serving.openapi", "serving.prompts"},
    {"harness", "scores", "export.merging", "serving.service"},
    {"training", "chat", "notebook", "report", "adapter_files", "shown"},
    {"trainer", "serving.batching", "serving.attention", "serving.reply"},
    {"planning"},
    {"guards"},
    {"checking"},
    {"engine.step", "model"},
    {"pretrained"},
    {"engine.decoder"},
    {"engine.attention", "engine.batch", "engine.flex", "engine.gather", "engine.layers"},
    {
        "engine.lanes",
        "engine.liger",
        "engine.loss",
        "engine.lora",
        "engine.ranks",
        "engine.trie",
        "engine",
    },
    {"engine.products"},
    {"engine.memory", "engine.onepass"},
    {"engine.amx_attention", "engine.amx_products"},
    {"engine.amx", "engine.compiler", "engine.kernels"},
    {"driver", "hyperparameters", "rehearsed", "steps", "machines"},
    {"cache", "rows", "runs", "tokenizer_trial"},
    {"serving.connections", "serving.gate", "serving.reading"},
    {"serving.refusals", "serving.vllm_command", "serving.wire", "serving"},
    {"render", "template", "writing", "records", "recipe", "rundir", "hub"},
    {"hub.clients", "hub.package", "records.files"},
    {"hub.aliases", "hub.disk", "hub.files", "hub.network", "records.json_rows", "records.row"},
    {"model_files", "records.found"},
    {
        "caller",
        "errors",
        "types",
        "commands",
        "system",
        "interrupts",
        "deadline",
        "language",
        "markup",
        "general",
        "rehearsal",
        "verdict",
        "confined",
        "loopback",
        "reading",
        "spelling",
        "terminal",
        "screen",
        "places",
        "export.llama_cpp",
        "export.go_template",
        "extras",
    },
]
COMMAND_LINE = LAYERS[:6]
WITHOUT_TORCH = {module for layer in (*COMMAND_LINE, *LAYERS[-5:]) for module in layer} | {"__init__"}
HEAVY = {"torch", "transformers", "peft", "accelerate"}


def modules() -> list[str]:
    return sorted(
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    )


def imports(module: str, *, at_start_only: bool = False) -> Iterator[str]:
    path = PACKAGE / (module.replace(".", "/") + ".py")
    tree = ast.parse((path if path.is_file() else PACKAGE / module / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body if at_start_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from named
            if not all(name.removeprefix("tunesmith.") in modules() for name in named):  # something of its own
                yield node.module


def layer_of(module: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if module in layer), None)


def test_every_module_has_its_place_in_the_picture() -> None:
    assert {m for m in modules() if layer_of(m) is None} - {"__init__"} == set()


@pytest.mark.parametrize("module", [m for m in modules() if m != "__init__"])
def test_no_module_imports_one_above_it(module: str) -> None:
    for name in imports(module):
        if not name.startswith("tunesmith"):
            continue
        imported = name.removeprefix("tunesmith").removeprefix(".")
        place = layer_of(imported)
        if place is not None and place < (layer_of(module) or 0):
            pytest.fail(f"{module} imports {imported}, which is above it")


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH - {"__init__"}))
def test_what_help_needs_does_not_import_torch(module: str) -> None:
    for name in imports(module, at_start_only=True):
        assert name.split(".")[0] not in HEAVY, f"{module} imports {name} at its start"


def test_the_check_sees_an_upward_import() -> None:
    assert layer_of("training") is not None and layer_of("errors") is not None
    assert layer_of("training") < layer_of("errors")  # type: ignore[operator]  # so errors importing training would fail
    assert "tunesmith.training" in set(imports("demo"))
