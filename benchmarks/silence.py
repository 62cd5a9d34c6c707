"""How long each command is silent on a terminal: the longest time between two outputs, and what stood there meanwhile.

    python benchmarks/silence.py [--model smollm2] [--rows 48] [--only train resume]

Every command has a terminal of its own. A spinner or a bar that moves is output; so a long time without any is one in
which nothing moves, and the last text says whether a person is told what is done. Writes JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tunesmith.cli.demo import PERSONA

HERE = Path(__file__).parent
LIMIT = 600
"""Seconds after which a command is ended."""
_STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Silence:
    """The longest time without output of one command."""

    command: str
    exit_code: int
    seconds: float
    longest_seconds: float
    meanwhile: str
    """The last text before it."""


def measured(arguments: Sequence[str], cwd: Path, *, stop_at: str | None = None, typed: str = "") -> Silence:
    """Runs a command on a terminal; `stop_at` is a text at which Ctrl-C is pressed, `typed` what is typed at the
    first prompt."""
    master, slave = pty.openpty()
    command = [sys.executable, "-P", "-m", "tunesmith", *arguments]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "TUNESMITH_OFFLINE": "1"}
    began = last = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    longest, meanwhile, shown = 0.0, "", ""
    while True:
        ready, _, _ = select.select([master], [], [], 0.05)
        piece = ""
        if ready:
            try:
                piece = os.read(master, 1 << 16).decode("utf-8", "replace")
            except OSError:  # nobody holds the other end
                break
        elif process.poll() is not None:
            break
        now = time.monotonic()
        if piece:
            if now - last > longest:
                longest, meanwhile = now - last, _last_line(shown)
            last, shown = now, (shown + piece)[-4000:]
        if stop_at and stop_at in shown:
            process.send_signal(signal.SIGINT)
            stop_at = None
        if "\x1b[6n" in piece:  # a terminal says where its cursor is
            os.write(master, b"\x1b[1;1R")
        if typed and "›" in shown:
            os.write(master, typed.encode())
            typed = ""
        if now - began > LIMIT:
            process.kill()
    code = process.wait()
    os.close(master)
    ended = time.monotonic()
    if ended - last > longest:
        longest, meanwhile = ended - last, _last_line(shown)
    for place in (f"{Path(sys.executable).parent}/", f"{Path.home()}/"):  # of this machine alone
        meanwhile = meanwhile.replace(place, "")
    return Silence(" ".join(arguments), code, round(ended - began, 1), round(longest, 1), meanwhile)


def _last_line(shown: str) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]", _STYLES.sub("", shown)) if line.strip()]
    return lines[-1][:100] if lines else "(nothing yet)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = list(_all(Path(scratch), asked.model, asked.rows, asked.only))
    where = asked.out / f"silence-{datetime.date.today()}.json"
    where.write_text(json.dumps([asdict(each) for each in found], indent=1, ensure_ascii=False) + "\n")
    print(where)
    if any(each.exit_code not in (0, 130) for each in found):
        sys.exit("Not every command came to its end.")


def _all(folder: Path, model: str, n_rows: int, only: Sequence[str]) -> Iterator[Silence]:
    lines = (PERSONA / "hester.en.jsonl").read_text(encoding="utf-8").splitlines()[:n_rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    few = ["rows.jsonl", "--model", model, "--epochs", "1", "--batch", "8"]
    chat = ["chat", "mine", "--max-tokens", "16"]
    commands: list[tuple[list[str], dict[str, str]]] = [
        (["--version"], {}),
        (["models"], {}),
        (["doctor"], {}),
        (["fetch", model], {}),
        (["check", *few], {}),
        (["plan", *few], {}),
        (["plan", *few, "--table"], {}),
        (["train", *few, "--out", "runs/mine"], {"stop_at": "step 2/"}),
        (["resume", "mine"], {}),
        (["train", *few, "--out", "runs/detached", "--detach"], {}),
        (["watch", "detached"], {}),
        (["runs"], {}),
        ([*chat, "--prompt", "Who are you?"], {}),
        (chat, {"typed": "Who are you?\r/quit\r"}),
        (["eval", "mine", "--data", "rows.jsonl"], {}),
        (["export", "mine", "--to", "adapter"], {}),
        (["export", "mine", "--to", "merged"], {}),
        (["export", "mine", "--to", "gguf"], {}),
        (["export", "mine", "--to", "ollama"], {}),
        (["serve", "mine", "--port", "0"], {"stop_at": "Ask it"}),
        (["tune", "rows.jsonl", "--model", model, "--batch", "8", "--trials", "2", "--out", "tunes/mine"], {}),
    ]
    for arguments, how in commands:
        if only and arguments[0] not in only:
            continue
        silence = measured(arguments, folder, **how)
        print(f"{silence.longest_seconds:6.1f} s of {silence.seconds:6.1f}  {silence.command}  [{silence.exit_code}]")
        print(f"          {silence.meanwhile}", flush=True)
        yield silence


if __name__ == "__main__":
    main()
