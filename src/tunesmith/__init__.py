"""From a file of examples to a model that answers like them.

import tunesmith

recipe, _ = tunesmith.resolve(flags={"model.name": "smollm2", "data.path": "rows.jsonl"})
run = tunesmith.train(recipe)
print(tunesmith.load(run.path).reply([{"role": "user", "content": "Who are you?"}]).text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.chat import Chat, Reply, load
    from tunesmith.check import Checked, check
    from tunesmith.errors import TunesmithError
    from tunesmith.recipe import Recipe, resolve
    from tunesmith.train import Run, Watcher, train
    from tunesmith.types import Message

__all__ = [
    "Chat",
    "Checked",
    "Message",
    "Recipe",
    "Reply",
    "Run",
    "TunesmithError",
    "Watcher",
    "check",
    "load",
    "resolve",
    "train",
]

_HOMES = {
    "Chat": "chat", "Reply": "chat", "load": "chat", "Checked": "check", "check": "check", "TunesmithError": "errors",
    "Recipe": "recipe", "resolve": "recipe", "Run": "train", "Watcher": "train", "train": "train", "Message": "types",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loads a name's module when it is first asked for, so that `tunesmith --help` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    # Some functions are called like their module (train, check): importing the module puts the module here, so every
    # name is set to what it stands for at once.
    value = getattr(importlib.import_module(f"tunesmith.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
