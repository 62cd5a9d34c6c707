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
    from tunesmith.checking import Checked, check
    from tunesmith.errors import TunesmithError
    from tunesmith.recipe import Recipe, resolve
    from tunesmith.training import Run, Watcher, train
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

# No module is called like a public function: importing it would put the module in the function's place.
_HOMES = {
    "Chat": "chat",
    "Checked": "checking",
    "Message": "types",
    "Recipe": "recipe",
    "Reply": "chat",
    "Run": "training",
    "TunesmithError": "errors",
    "Watcher": "training",
    "check": "checking",
    "load": "chat",
    "resolve": "recipe",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """Loads a name's module when it is first asked for, so that `tunesmith --help` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    return getattr(importlib.import_module(f"tunesmith.{_HOMES[name]}"), name)
