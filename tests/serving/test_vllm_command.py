"""The command by which vLLM serves the same adapters."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from served import KNOWS
from tunesmith.serving import vllm_command
from tunesmith.serving.server import Serving

# https://docs.vllm.ai/en/stable/features/lora and https://docs.vllm.ai/en/stable/cli/serve: flags and what they take.
DOCUMENTED = {
    "--enable-lora": "nothing",
    "--lora-modules": "name=path, several",
    "--max-lora-rank": "one of 1, 8, 16, 32, 64, 128, 256, 320, 512",
    "--max-loras": "a number of at least 1",
    "--chat-template": "a file or a template",
    "--generation-config": "auto, vllm or a folder with generation_config.json",
}


def flags_of(line: str) -> tuple[list[str], dict[str, list[str]]]:
    words = shlex.split(line)
    flags: dict[str, list[str]] = {}
    plain: list[str] = []
    current = plain
    for word in words:
        if word.startswith("--"):
            current = flags[word] = []
        else:
            current.append(word)
    return plain, flags


def adapter_of(folder: Path, template: str = "x", **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "bias": "none", **settings}))
    return folder


def test_the_vllm_command_names_documented_flags_and_existing_files(runs: dict[str, Path]) -> None:
    lines: list[str] = []
    server = Serving([runs["bo"], runs["mia"]], port=0, tell=lines.append)
    server._socket.close()
    server._introduce()
    (line,) = [line.partition("\n")[2].strip() for line in lines if "vllm serve" in line]
    plain, flags = flags_of(line)
    assert plain == ["vllm", "serve", str(runs["base"])]
    assert set(flags) <= set(DOCUMENTED)
    modules = dict(module.split("=", 1) for module in flags["--lora-modules"])
    assert modules == {name: str(runs[name] / "adapter") for name in KNOWS}
    assert flags["--max-lora-rank"] == ["32"] and flags["--max-loras"] == ["2"] and flags["--enable-lora"] == []
    assert Path(flags["--chat-template"][0]).read_text() == (runs["bo"] / "adapter/chat_template.jinja").read_text()
    stops = json.loads((Path(flags["--generation-config"][0]) / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [258]


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (300, 320), (512, 512)])
def test_the_rank_is_one_that_vllm_takes(rank: int, allowed: int, tmp_path: Path) -> None:
    line, left_out = vllm_command.command("base", [("a", adapter_of(tmp_path / "a", r=rank))])
    assert flags_of(line)[1]["--max-lora-rank"] == [str(allowed)]
    assert left_out == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"r": 513}, "512"),
    ],
)
def test_what_vllm_can_not_serve_is_said(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    broken, whole = adapter_of(tmp_path / "a", **settings), adapter_of(tmp_path / "b c")
    assert vllm_command.command("base", [("a", broken)])[0] == ""
    line, left_out = vllm_command.command("base", [("a", broken), ("b", whole)])
    assert flags_of(line)[1]["--lora-modules"] == [f"b={whole}"]
    assert len(left_out) == 1 and told in left_out[0]


def test_vllm_has_one_template_for_all(tmp_path: Path) -> None:
    first, second = adapter_of(tmp_path / "a", "x"), adapter_of(tmp_path / "b", "y")
    line, left_out = vllm_command.command("base", [("a", first), ("b", second)])
    assert flags_of(line)[1]["--lora-modules"] == [f"a={first}"]
    assert "another chat template" in left_out[0]
