"""The command by which vLLM serves the same adapters (https://docs.vllm.ai/en/stable/features/lora).

vLLM is for many users at once on GPUs. It is told where the template and the stop ids of the training lie, since it
would take those of the base otherwise.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from tunesmith.language import said

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be (MaxLoRARanks of vllm/config/lora.py, v0.26)."""


def command(base: str, adapters: Sequence[tuple[str, Path]]) -> tuple[str, list[str]]:
    """The command line for a base (hub id or folder) and its adapters by name, and what it leaves out and why.

    An empty command where nothing is left to serve.
    """
    settings = {name: json.loads((path / "adapter_config.json").read_text(encoding="utf-8")) for name, path in adapters}
    left_out, taken, template = [], [], None
    for name, path in adapters:
        text = (path / "chat_template.jinja").read_text(encoding="utf-8")
        if reason := _not_served(settings[name]):
            left_out.append(said("{name}: {reason}", name=name, reason=reason))
        elif template is not None and text != template:
            reason = said("another chat template than {other}'s, and vLLM has one for all", other=taken[0][0])
            left_out.append(said("{name}: {reason}", name=name, reason=reason))
        else:
            template = text
            taken.append((name, path))
    if not taken:
        return "", left_out
    rank = max(int(settings[name]["r"]) for name, _ in taken)
    first = taken[0][1]
    words = ["vllm", "serve", base, "--enable-lora"]
    words += ["--lora-modules", *(f"{name}={path}" for name, path in taken)]
    words += ["--max-lora-rank", str(next(allowed for allowed in RANKS if allowed >= rank))]
    words += ["--max-loras", str(len(taken))]
    words += ["--chat-template", str(first / "chat_template.jinja"), "--generation-config", str(first)]
    return shlex.join(words), left_out


def _not_served(settings: dict[str, object]) -> str | None:
    """Why vLLM refuses an adapter (vllm/lora/peft_helper.py)."""
    if settings.get("use_dora"):
        return said("vLLM does not do DoRA; export it with --to merged")
    if settings.get("modules_to_save"):
        return said("vLLM takes no modules_to_save; export it with --to merged")
    if settings.get("bias", "none") != "none":
        return said("vLLM takes no biases in an adapter; export it with --to merged")
    if int(str(settings["r"])) > RANKS[-1]:
        return said("vLLM takes no rank above {rank}; export it with --to merged", rank=RANKS[-1])
    return None
