"""From a file of examples to a model that answers like them.

import tunesmith

recipe, _ = tunesmith.resolve(flags={"model.name": "smollm2", "data.path": "rows.jsonl"})
run = tunesmith.train(recipe)
print(tunesmith.load(run.path).reply([{"role": "user", "content": "Who are you?"}]).text)
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.chat import Chat, Reply, load
    from tunesmith.errors import TunesmithError
    from tunesmith.recipe import Recipe, resolve
    from tunesmith.training.checking import Checked, check
    from tunesmith.training.planning import Plan, plan
    from tunesmith.training.run import Run, resume, train
    from tunesmith.training.trainer import Watcher
    from tunesmith.types import Message

    __version__: str

# With the package `kernels` installed, transformers would fetch code for some layers from a hub.
os.environ.setdefault("USE_HUB_KERNELS", "NO")
# In a notebook without ipywidgets tqdm warns as soon as a library imports it; no bar of it is shown here.
warnings.filterwarnings("ignore", "IProgress not found")

__all__ = [
    "Chat",
    "Checked",
    "Message",
    "Plan",
    "Recipe",
    "Reply",
    "Run",
    "TunesmithError",
    "Watcher",
    "check",
    "load",
    "plan",
    "resolve",
    "resume",
    "train",
]

# No module is called like a public function: importing it would put the module in the function's place.
_HOMES = {
    "Chat": "chat",
    "Checked": "training.checking",
    "Message": "types",
    "Plan": "training.planning",
    "Recipe": "recipe",
    "Reply": "chat",
    "Run": "training.run",
    "TunesmithError": "errors",
    "Watcher": "training.trainer",
    "check": "training.checking",
    "load": "chat",
    "plan": "training.planning",
    "resolve": "recipe",
    "resume": "training.run",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    """Loads a name's module when it is first asked for, so that `tunesmith --help` needs no torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("tunesmith")
    if name not in _HOMES:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    from tunesmith.system import refuse_windows

    refuse_windows()
    return getattr(importlib.import_module(f"tunesmith.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
