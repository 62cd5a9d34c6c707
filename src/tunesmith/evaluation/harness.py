"""lm-evaluation-harness on base and tuned model, where somebody wants figures that others have as well."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith import commands
from tunesmith.chat import Chat
from tunesmith.errors import RecipeError
from tunesmith.language import said
from tunesmith.recipe import read_yaml


def require() -> None:
    """Raises RecipeError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        fix = said("Run: {command}", command=commands.pip_install("lm_eval[hf]"))
        raise RecipeError("--tasks", said("no lm-evaluation-harness"), said("the package lm_eval"), fix)


def measure(chat: Chat, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """`{"TASK METRIC": {"base": …, "tuned": …}}`. A task is a name that the harness knows, or a YAML file of its kind.

    Prompts are written with the chat template. Raises RecipeError for a task that is not known. A task's file is a
    program of its author: the harness renders what stands in it without limits.
    """
    require()
    lm_eval, models, catalogue = (
        importlib.import_module(f"lm_eval{part}") for part in ("", ".models.huggingface", ".tasks")
    )
    known = catalogue.TaskManager()
    wanted: list[Any] = []
    for task in tasks:
        if Path(task).is_file():
            wanted.append(read_yaml(task)[0])
        elif task in known.all_tasks:
            wanted.append(task)
        else:
            expected = said("a name that `lm_eval ls tasks` lists, or a YAML file")
            raise RecipeError("--tasks", repr(task), expected, said("Check the spelling."))
    model = models.HFLM(pretrained=chat.model, tokenizer=chat.renderer.template.tokenizer)
    table: dict[str, dict[str, float]] = {}
    for side in ("base", "tuned"):
        with chat.switched(base=side == "base"):
            results = lm_eval.simple_evaluate(model=model, tasks=wanted, task_manager=known, apply_chat_template=True)
        for task, figures in results["results"].items():
            for metric, value in figures.items():
                name = metric.removesuffix(",none")
                if isinstance(value, float) and "stderr" not in name:
                    table.setdefault(f"{task} {name}", {})[side] = value
    return table
