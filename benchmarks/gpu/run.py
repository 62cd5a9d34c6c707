"""Everything that is measured on a card, in two parts, each a command of its own.

    python benchmarks/gpu/run.py 1 --out FOLDER        seven minutes at most on an H200
    python benchmarks/gpu/run.py 2 --out FOLDER        four and a half
    python benchmarks/gpu/run.py 1 2 --out FOLDER --tiny        on a CPU, to see that it runs

With the torch that is there; nothing is fetched, weights are random. Each section is a process with a limit of time,
and gpu-<date>.json is written anew after each, so that what was measured stays whatever comes later. --only NAME …
measures some sections again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECTIONS: dict[str, tuple[int, int]] = {
    "machine": (1, 45),
    "compiling": (1, 75),
    "attention": (1, 90),
    "Qwen3-0.6B": (1, 60),
    "Qwen3-1.7B": (1, 60),
    "Qwen3-8B": (1, 90),
    "4 bits": (2, 45),
    "24 GiB": (2, 60),
    "peers": (2, 80),
    "the line": (2, 85),
}
"""Each with its part and the seconds after which it is ended."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", type=int, metavar="PART", help="1, 2 or both")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", default=())
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    parser.add_argument("--tiny", action="store_true", help="small models and few tokens, to see that it runs")
    arguments = parser.parse_args()
    path = arguments.out / f"gpu-{datetime.date.today().isoformat()}{'-tiny' if arguments.tiny else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sections": {}}
    result |= {"date": datetime.date.today().isoformat(), "python": platform.python_version(), "versions": versions()}
    asked = [n for n, (part, _) in SECTIONS.items() if n in arguments.only or part in arguments.parts]
    for name in asked:
        began = time.monotonic()
        result["sections"][name] = measured(name, tiny=arguments.tiny)
        result["sections"][name]["wall"] = round(time.monotonic() - began, 1)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(result['sections'][name])[:600]}", flush=True)
    print(path)
    return 1 if any("failed" in result["sections"][name] for name in asked) else 0


def measured(name: str, *, tiny: bool) -> dict[str, Any]:
    """What a section says, or how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        command = [sys.executable, str(HERE / "sections.py"), name, str(out), *(["--tiny"] if tiny else [])]
        environment = {"TUNESMITH_CACHE": str(Path(folder) / "cache"), **os.environ}
        failed = {}
        try:
            ran = subprocess.run(
                command, timeout=SECTIONS[name][1], env=environment, capture_output=True, text=True, errors="replace"
            )
            if ran.returncode:
                failed = {"failed": f"exit {ran.returncode}", "said": ran.stderr[-1500:]}
        except subprocess.TimeoutExpired as late:
            failed = {"failed": f"not done after {SECTIONS[name][1]} s", "said": str(late.stderr or b"")[-1500:]}
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        return {**found, **failed}


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "transformers", "peft", "liger-kernel", "trl", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not here"
    return found


if __name__ == "__main__":
    raise SystemExit(main())
