"""What the kernels of flex attention take of cards that are not here, over heads, ratios, lengths and styles.

    python benchmarks/card_kernels.py [--processes 2] [--only TEXT]

No card is needed: torch and Triton are told of one, and what inductor writes is compiled for it and never run
(tests/compiled_flex.py). Writes JSON and prints a table; exits with 1 unless every
kernel was written, compiled and has enough shared memory. Heads of 256 in fp32 are not asked for on a T4: no tile has
room there, and the engine walks through the tree instead.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CARDS = {"T4": "float16", **dict.fromkeys(("A100", "RTX 3090", "RTX 4090", "H200", "RTX 5090"), "bfloat16")}
"""And the type of 16 bits that each multiplies in."""
SIZES = (64, 96, 128, 256)
RATIOS = range(1, 13)
SHORT, LONG = 48, 300
EVERYTHING = "softcap=50:window=32:sinks"
STYLES = ("", "softcap=50", "window=32", "sinks", EVERYTHING)
AT_ONCE = 12  # a process has to import torch first


def asked() -> list[str]:
    """Every card, size and type, plain and with everything; every ratio and length where there is least room, and
    every style."""
    found: list[str] = []

    def ask(card: str, ratio: int, size: int, dtype: str, length: int, style: str) -> None:
        if (card, size, dtype) != ("T4", 256, "float32"):
            found.append(":".join(filter(None, [card, f"{2 * ratio}/2x{size}", dtype, str(length), style])))

    for card, size, style in itertools.product(CARDS, SIZES, ("", EVERYTHING)):
        for dtype, length in ((CARDS[card], LONG), (CARDS[card], SHORT), ("float32", SHORT)):
            ask(card, 4, size, dtype, length, style)
    for card, size, ratio in itertools.product(("T4", "RTX 4090"), SIZES, RATIOS):
        ask(card, ratio, size, CARDS[card], SHORT, EVERYTHING)
        ask(card, ratio, size, CARDS[card], LONG, "")
    for card, size, style in itertools.product(("T4", "RTX 5090"), SIZES, STYLES):
        ask(card, 3, size, CARDS[card], LONG, style)
    return list(dict.fromkeys(found))


def compiled(some: Sequence[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as cache:
        ran = subprocess.run(
            [sys.executable, HERE.parent / "tests" / "compiled_flex.py", *some],
            env={**os.environ, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    for one in set(some) - {each["asked"] for each in found}:
        found.append({"asked": one, "error": ran.stderr[-500:]})
    return found


def lines(kernels: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| card | kernels | fit | most of its shared memory |"
    yield "|---|---|---|---|"
    for card in CARDS:
        of_card = [kernel for kernel in kernels if kernel["asked"].startswith(f"{card}:")]
        if of_card:
            most = max(
                ((k["shared"] / k["limit"], k["asked"]) for k in of_card if "error" not in k), default=(0, "none")
            )
            yield f"| {card} | {len(of_card)} | {sum(map(fits, of_card))} | {most[0]:.0%}, {most[1]} |"


def fits(kernel: dict[str, Any]) -> bool:
    return "error" not in kernel and kernel["shared"] <= kernel["limit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="what a line has to contain")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    every = [line for line in asked() if arguments.only in line]
    kernels: list[dict[str, Any]] = []
    with ThreadPoolExecutor(arguments.processes) as pool:
        for found in pool.map(compiled, [every[n : n + AT_ONCE] for n in range(0, len(every), AT_ONCE)]):
            kernels += found
            print(f"{len(kernels)} kernels of {len(every)} calls", file=sys.stderr, flush=True)
    result = {
        "what": "shared memory of flex attention's kernels, compiled for cards that are not here",
        "date": str(datetime.date.today()),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
        "calls": len(every),
        "kernels": kernels,
    }
    path = arguments.out / f"cards-{result['date']}.json"
    path.write_text(json.dumps(result, indent=None if len(kernels) > 500 else 1) + "\n", encoding="utf-8")
    print("\n".join(lines(kernels)))
    broken = [kernel for kernel in kernels if not fits(kernel)]
    for kernel in broken:
        print(kernel, file=sys.stderr)
    twice = Counter(kernel["asked"] for kernel in kernels if "error" not in kernel)
    lacking = [one for one in every if twice[one] != 2]
    print(f"{len(kernels) - len(broken)} of {len(kernels)} kernels fit; written to {path}")
    if broken or lacking:
        sys.exit(f"Not both passes: {lacking}" if lacking else 1)


if __name__ == "__main__":
    main()
