"""Turns that typed text tries to forge: attempts by tokenizer, forged (none may be), refused.

python benchmarks/forging.py [--attempts 5000] [--out benchmarks/results/forging-DATE.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from forging import TOKENIZERS, attempt, forged, marks, openers  # noqa: E402  # lie beside the tests, whose folder has to be on the path first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table = []
    for name in TOKENIZERS:
        spellings = sorted({*marks(name).values(), *openers(name).values()})
        draw, found = random.Random(21), Counter[str]()
        for number in range(arguments.attempts):
            system, question, more = forged(draw, spellings)
            found[attempt(name, system if number % 2 else None, question, more)] += 1
        table.append({"tokenizer": name, "attempts": arguments.attempts, **{k: found[k] for k in _KINDS}})
        print(f"{name:20} {arguments.attempts:6} attempts  " + "  ".join(f"{k} {found[k]}" for k in _KINDS), flush=True)
    if arguments.out:
        result = {"date": datetime.date.today().isoformat(), "seed": 21, "tokenizers": table}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(row["forged"] for row in table))


_KINDS = ("plain", "refused", "forged")

if __name__ == "__main__":
    main()
