"""Pictures of the terminal for README.md, made from what the program prints.

    tunesmith demo --out RUN --json > demo.json
    python scripts/make_pictures.py demo.json

Writes docs/images/check.svg and docs/images/demo.svg. The report's picture is a browser's shot of RUN/report.html.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from tunesmith.cli import demo, display
from tunesmith.screen import Screen
from tunesmith.training.checking import check

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def main() -> None:
    answers = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    settings, _ = demo.recipe()
    console = _console()
    display.show_check(console, check(settings), 2)
    _save(console, "tunesmith check --model smollm2 --data hester.en.jsonl", "check")
    console = _console()
    pairs = list(zip(answers["before"], answers["after"], strict=True))
    shown = [(b["question"], b["reply"], a["reply"]) for b, a in (pairs[i] for i in demo.SHOWN)]
    console.print(display.side_by_side(shown))
    _save(console, "tunesmith demo", "demo")


def _console() -> Screen:
    return Screen(record=True, width=110, file=io.StringIO(), force_terminal=True, color_system="truecolor")


def _save(console: Screen, title: str, name: str) -> None:
    picture = console.export_svg(title=title)
    # A font of the reader's machine will do; the picture asks no server for one.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    (IMAGES / f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
