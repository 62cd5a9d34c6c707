"""How to go on: what a command ends with, one or two commands that a shell takes as they stand."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import commands, extras, runs
from tunesmith.language import said
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir

if TYPE_CHECKING:
    from tunesmith.export import Export
    from tunesmith.screen import Screen

Way = tuple[str, str]
"""What for, and the command."""


def go_on(console: Screen, *ways: Way) -> None:
    """The one place where a command says how to go on; where `console` goes, so never between JSON."""
    for number, (what_for, command) in enumerate(ways):
        console.labelled(
            "" if number else said("next"), said("{what_for}: {command}", what_for=what_for, command=command)
        )


def after_check(words: Sequence[str]) -> list[Way]:
    """`words` are the command line's own, but for the command."""
    return [
        (said("See what it takes"), commands.tunesmith("plan", *words)),
        (said("Train"), commands.tunesmith("train", *words)),
    ]


def after_faults(words: Sequence[str], *, some_are_good: bool) -> list[Way]:
    mended = (said("Check again when they are mended"), commands.tunesmith("check", *words))
    if not some_are_good:
        return [mended]
    without = commands.tunesmith("train", *words, "--set", "data.allow_set_aside=true")
    return [mended, (said("Train without them"), without)]


def after_plan(words: Sequence[str], *, fits: bool) -> list[Way]:
    if fits:
        return [(said("Train"), commands.tunesmith("train", *words))]
    return [(said("See on which cards it fits"), commands.tunesmith("plan", *words, "--table"))]


def after_run(run: Path, state: runs.State) -> list[Way]:
    """By what has become of it."""
    if state == "running":
        return [(said("Follow it"), commands.tunesmith("watch", run))]
    if state != "done":
        return [(said("Go on with it"), commands.tunesmith("resume", run))]
    return [
        (said("Talk with it"), commands.tunesmith("chat", run)),
        (said("Compare it with its base"), _with_extra("eval", run)) if _can_be_measured(run) else _export(run),
    ]


def after_detaching(run: Path, pid: int) -> list[Way]:
    return [*after_run(run, "running"), (said("Stop it, with a point to go on from"), commands.line("kill", str(pid)))]


def after_all(found: Sequence[runs.RunState]) -> list[Way]:
    """By the newest of some runs."""
    if not found:
        return [(said("Train a small one"), commands.tunesmith("demo"))]
    return after_run(found[-1].path, found[-1].state)


def after_demo(run: Path) -> list[Way]:
    return [after_run(run, "done")[0], (said("Train on your own rows"), commands.tunesmith("train", "--help"))]


def after_chat(name: str) -> list[Way]:
    """With a run or a model."""
    run = runs.find(name)
    return [
        _serve(name),
        (said("Tune it on your rows"), commands.tunesmith("train", "--help")) if run is None else _export(run),
    ]


def after_eval(run: Path, *, good: bool) -> list[Way]:
    if good:
        return [_serve(run), _export(run)]
    return [(said("Ask it yourself"), commands.tunesmith("chat", run))]


def after_export(run: Path, export: Export) -> list[Way]:
    if export.to == "merged":
        return [
            (said("Talk with it"), commands.tunesmith("chat", export.path)),
            _serve(export.path),
        ]
    if export.to == "gguf":
        (file,) = export.path.glob("*.gguf")
        return [(said("Talk with it in llama.cpp"), commands.line("llama-cli", "-m", file))]
    if export.to == "ollama":
        name = re.sub(r"[^a-z0-9._-]+", "-", run.resolve().name.lower()).strip("-._") or "tuned"
        return [
            (said("Bring it to Ollama"), commands.line("ollama", "create", name, "-f", export.path / "Modelfile")),
            (said("and then talk with it"), commands.line("ollama", "run", name)),
        ]
    base = rundir.read_manifest(RunDir(run))["base"]
    where = [] if str(base["source"]).startswith("hf:") else ["--base", base["folder"]]
    script = export.path / "load_and_chat.py"
    return [
        (said("Ask it without tunesmith"), commands.line(commands.near(sys.executable), script, *where, "Who are you?"))
    ]


def after_serving(url: str, models: Sequence[str], *, key: bool) -> list[Way]:
    """What can be asked at an address that answers."""
    asked = {"model": models[-1], "messages": [{"role": "user", "content": "Who are you?"}]}
    body = ("-H", "Content-Type: application/json", "-d", json.dumps(asked, ensure_ascii=False))
    header = ' -H "Authorization: Bearer $TUNESMITH_API_KEY"' if key else ""
    return [(said("Ask it from another terminal"), commands.line("curl", f"{url}/v1/chat/completions", *body) + header)]


def after_study(best: tuple[Path, Path] | None, to_go_on: Sequence[str] | None) -> list[Way]:
    """`best`: run and recipe of the best trial. `to_go_on`: the command line's own words, where trials are waiting."""
    ways = [] if to_go_on is None else [(said("Go on with the study"), commands.tunesmith("tune", *to_go_on))]
    if best is None:
        return ways
    run, recipe = best
    talk, train = (said("Talk with the best"), commands.tunesmith("chat", run)), commands.tunesmith("train", recipe)
    return [*ways, talk, (said("Train with the best settings anew"), train)][:2]


def after_models(first: str) -> list[Way]:
    return [(said("Bring one here"), commands.tunesmith("fetch", first))]


def after_fetch(model: str) -> list[Way]:
    return [(said("Talk with it"), commands.tunesmith("chat", model))]


def after_doctor() -> list[Way]:
    return [
        (said("See it all once"), commands.tunesmith("demo")),
        (said("See the models"), commands.tunesmith("models")),
    ]


def _serve(name: str | Path) -> Way:
    return said("Serve it"), _with_extra("serve", name)


def _export(run: Path) -> Way:
    return said("Take it to llama.cpp"), _with_extra("export", run, "--to", "gguf")


def _with_extra(command: str, *words: str | Path) -> str:
    """A command whose extra has its name, after what installs that where it is missing."""
    asked = commands.tunesmith(command, *words)
    return f"{commands.pip_install(f'tunesmith[{command}]')} && {asked}" if extras.missing(command) else asked


def _can_be_measured(run: Path) -> bool:
    """Two rows or more are held out."""
    if not RunDir(run).held_out.is_file():
        return False
    with RunDir(run).ledger.open(encoding="utf-8", errors="replace") as ledger:  # of as many lines as the data has rows
        return len(list(islice((line for line in ledger if '"state": "held_out"' in line), 2))) == 2
