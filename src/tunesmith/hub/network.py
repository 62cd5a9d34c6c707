"""Whether the network may be used."""

from __future__ import annotations

import os
import sys


def offline() -> bool:
    """Whether TUNESMITH_OFFLINE forbids the network."""
    return os.environ.get("TUNESMITH_OFFLINE", "").strip().lower() not in ("", "0", "no", "off", "false")


def forbid_network() -> None:
    """Tells Hugging Face's libraries, loaded or not, to stay off the network; ModelScope's is then never called."""
    tell_huggingface("HF_HUB_OFFLINE")


def tell_huggingface(variable: str) -> None:
    os.environ[variable] = "1"
    # huggingface_hub reads the environment once, when it is imported.
    if loaded := sys.modules.get("huggingface_hub.constants"):
        setattr(loaded, variable, True)
