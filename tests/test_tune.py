"""A study: what is tried, what is best, what it costs, and that nothing which befalls it is lost."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import ASKED, Ended, cases, finished, script, start
from small_runs import flags_of, settings
from tunesmith import chat, recipe
from tunesmith.cli import display
from tunesmith.errors import OutOfMemory, RecipeError, RunError
from tunesmith.evaluation import general
from tunesmith.evaluation.general import questions
from tunesmith.runs import rundir
from tunesmith.runs.rundir import RunDir
from tunesmith.screen import Screen
from tunesmith.training.run import train
from tunesmith.training.trainer import StepMetrics, Watcher
from tunesmith.tuning import tune
from tunesmith.tuning.page import write_page
from tunesmith.tuning.tune import Searched, Study, Trial
from warm import Forked

SHORT = {"train.epochs": 1}
RATE = Searched("train.learning_rate", 1e-6, 1e-2, log=True)
FEW = f"""
from tunesmith import cli
from tunesmith.evaluation import general
few = general.questions()[:{ASKED}]
general.questions = lambda: few
cli.main()
"""
"""The command line, which asks so many."""
LONG = 900
"""Seconds that a busy machine may take for what takes some."""


def tunesmith(*arguments: str | Path, cwd: Path | None = None) -> Ended:
    return finished(start(*arguments, cwd=cwd, program=FEW), LONG)


def held_to_know_all(given: recipe.Recipe, folder: Path, count: int) -> None:
    """Begins a study whose base is said to have answered all questions rightly."""
    tune.tune(given, folder, trials=1, hours=0)
    (folder / "general.json").write_text(json.dumps({"right": [True] * count}))


def told(study: Study) -> list[tuple[Any, ...]]:
    """What came out of the trials, without clocks."""
    return [(t.number, t.settings, t.state, t.held_out_loss, t.general, t.forgot, t.why) for t in study.trials]


def as_printed(answer: dict[str, Any]) -> list[tuple[Any, ...]]:
    names = ("number", "settings", "state", "held_out_loss", "general", "forgot", "why")
    return [tuple(trial[name] for name in names) for trial in answer["trials"]]


@pytest.fixture(scope="module")
def undisturbed_study(tiny_model: Path, talk: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two trials that nobody stopped; do not write into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general, "questions", lambda: questions()[:ASKED])
        return tune.tune(settings(tiny_model, talk), tmp_path_factory.mktemp("tunes") / "undisturbed", trials=2)


# --- what is tried, and what is best ----------------------------------------------------------------------------------


def test_the_first_trial_is_the_recipe_as_it_stands_and_the_others_are_within_the_bounds(
    undisturbed_study: Study, tiny_model: Path, talk: Path, tmp_path: Path
) -> None:
    first, *others = undisturbed_study.trials
    assert first.settings == {
        "train.learning_rate": 1e-2,
        "train.epochs": 2,
        "lora.r": 8,
        "train.rehearse": 0,
    }  # the rate is above the bound
    for trial in others:
        for searched in tune.SPACE:
            assert searched.low <= trial.settings[searched.name] <= max(searched.high, first.settings[searched.name])
    assert len({json.dumps(trial.settings) for trial in undisturbed_study.trials}) == 2
    alone = train(settings(tiny_model, talk, **{"eval.every": "5 steps"}), tmp_path / "alone")
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (alone.path, first.run)]
    assert weights[0] == weights[1]
    assert alone.held_out_loss is not None and first.held_out_loss == alone.held_out_loss[1]


def test_all_trials_hold_out_the_same_rows(undisturbed_study: Study) -> None:
    ledgers = {(trial.run / "ledger.jsonl").read_text() for trial in undisturbed_study.trials}
    assert len(ledgers) == 1 and '"held_out"' in ledgers.pop()


def test_the_best_has_the_lowest_loss_and_its_recipe_trains_it_again(undisturbed_study: Study) -> None:
    best = undisturbed_study.best
    assert best is not None
    assert best.held_out_loss == min(trial.held_out_loss or math.inf for trial in undisturbed_study.trials)
    written, _ = recipe.resolve(undisturbed_study.best_recipe)
    for name, value in best.settings.items():
        section, _, field = name.partition(".")
        assert getattr(getattr(written, section), field) == value
    assert written.eval.every == "1 epoch"  # what a study measures by is not the recipe's business
    assert undisturbed_study.best_recipe.read_text() == undisturbed_study.recipe


def test_the_best_recipe_finds_its_data_from_any_folder(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_questions: None
) -> None:
    monkeypatch.chdir(talk.parent)
    found = tune.tune(settings(Path(os.path.relpath(tiny_model)), Path(talk.name), **SHORT), tmp_path / "a", trials=1)
    monkeypatch.chdir(tmp_path)
    written, _ = recipe.resolve(found.best_recipe)
    assert Path(written.data.path).samefile(talk) and Path(written.model.name).samefile(tiny_model)


def test_finished_trials_keep_their_adapter_and_no_checkpoints(undisturbed_study: Study) -> None:
    for trial in undisturbed_study.trials:
        run = RunDir(trial.run)
        assert rundir.is_whole(run.adapter) and run.report.is_file() and not run.checkpoints.exists()
    assert not any((undisturbed_study.path / "workers").iterdir())


def test_a_trial_that_forgot_is_never_the_best(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model knows next to nothing; where its base is held to have known all, every trial has forgotten."""
    monkeypatch.setattr(general, "questions", lambda: questions()[:20])
    given = settings(tiny_model, talk, **SHORT)
    held_to_know_all(given, tmp_path / "study", 20)
    found = tune.tune(given, tmp_path / "study", trials=1)
    assert [(trial.state, trial.forgot) for trial in found.trials] == [("done", True)]
    assert found.best is None and not found.best_recipe.exists() and found.general == 20
    assert "without forgetting" in found.page.read_text()


def test_the_best_is_found_among_those_that_came_to_their_end_and_forgot_nothing() -> None:
    def trial(number: int, loss: float, state: tune.State = "done", has_forgotten: bool = False) -> Trial:
        return Trial(number, Path("r"), {}, state, loss, 50, has_forgotten, 1.0, "")

    trials = (trial(0, 3), trial(1, 1, "pruned"), trial(2, 1.5, has_forgotten=True), trial(3, 2), trial(4, 2))
    study = Study(Path("s"), "s", 5, trials, 50, "")
    assert study.best == trials[3]
    assert replace(study, trials=trials[1:3]).best is None


@pytest.mark.parametrize("words", ["en", "zh"])
def test_the_table_is_whole_in_eighty_columns(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_LANG", words)
    drawn = {"train.learning_rate": 0.00186, "train.epochs": 3, "lora.r": 128, "train.rehearse": 0.125}
    trials = tuple(Trial(n, Path(str(n)), drawn, "done", 12.298, 47, n == 1, 12345.0, "") for n in range(3))
    out = io.StringIO()
    screen = Screen(file=out, width=80, force_terminal=True, color_system=None)
    display.show_study(screen, Study(Path("s"), "s", 5, trials, 44, ""))
    assert "…" not in out.getvalue() and out.getvalue().count("44") == 1
    for row in ("0000", "0001", "0002"):
        (line,) = (line for line in out.getvalue().splitlines() if line.lstrip().startswith(row))
        assert re.split(" +", line.strip())[-7:] == ["0.00186", "3", "128", "0.125", "12.298", "47", "12345"]


def test_the_base_is_asked_once_in_a_study(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_questions: None
) -> None:
    asked: list[bool] = []
    replies = chat.Chat.replies

    def counted(self: chat.Chat, talks: Any, **options: Any) -> Any:
        if options.get("max_tokens") == general.TOKENS:
            asked.append(options["base"])
        return replies(self, talks, **options)

    monkeypatch.setattr(chat.Chat, "replies", counted)
    given = settings(tiny_model, talk, **SHORT)
    tune.tune(given, tmp_path / "study", trials=2)
    tune.tune(given, tmp_path / "study", trials=3)
    assert sorted(asked) == [False, False, False, True]


# --- stopped early ----------------------------------------------------------------------------------------------------


def test_a_trial_above_the_median_of_the_others_is_pruned_and_keeps_its_newest_checkpoint(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_questions: None
) -> None:
    """Rates from 1e-6, at which nothing is learned in nine steps, to 1e-2: which are drawn is a matter of the seed."""
    monkeypatch.setattr(tune, "SPACE", (RATE,))
    found = tune.tune(settings(tiny_model, talk, **SHORT), tmp_path / "study", trials=6)
    pruned = [trial for trial in found.trials if trial.state == "pruned"]
    done = [trial for trial in found.trials if trial.state == "done"]
    assert pruned and all(trial.number >= 5 for trial in pruned) and len(done) >= 5
    rates = sorted(trial.settings["train.learning_rate"] for trial in done)
    for trial in pruned:
        assert "above the median" in trial.why and trial.settings["train.learning_rate"] < rates[len(rates) // 2]
        run = RunDir(trial.run)
        assert len(run.points()) == 1 and rundir.is_whole(run.points()[0]) and not run.adapter.exists()
        assert 0 < len(rundir.read_lines(run.metrics)) < 9
    assert found.best in done


def test_trials_that_forgot_prune_nobody(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(general, "questions", lambda: questions()[:20])
    monkeypatch.setattr(tune, "SPACE", (RATE,))
    given = settings(tiny_model, talk, **SHORT)
    held_to_know_all(given, tmp_path / "study", 20)
    found = tune.tune(given, tmp_path / "study", trials=6)
    assert {(trial.state, trial.forgot) for trial in found.trials} == {("done", True)}


def test_a_trial_that_does_not_fit_into_memory_is_pruned_and_the_first_one_ends_the_study(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_questions: None
) -> None:
    monkeypatch.setattr(tune, "SPACE", (Searched("lora.r", 10**9, 2 * 10**9),))
    with pytest.raises(OutOfMemory):
        tune.tune(settings(tiny_model, talk, **SHORT, **{"lora.r": 10**9}), tmp_path / "first", trials=2)
    monkeypatch.setattr(tune, "SPACE", (Searched("lora.r", 8, 2 * 10**9),))
    found = tune.tune(settings(tiny_model, talk, **SHORT), tmp_path / "study", trials=2)
    assert [trial.state for trial in found.trials] == ["done", "pruned"]
    assert "GiB needed" in found.trials[1].why and found.best == found.trials[0]


# --- a budget ---------------------------------------------------------------------------------------------------------


def test_what_would_take_longer_than_the_time_that_is_left_is_not_begun(
    tiny_model: Path, talk: Path, tmp_path: Path
) -> None:
    found = tune.tune(settings(tiny_model, talk), tmp_path / "study", trials=2, hours=0)
    assert [trial.state for trial in found.trials] == ["waiting"] and not found.trials[0].run.exists()
    assert "would take longer" in found.ended and found.best is None and not found.interrupted


def test_a_process_that_joins_or_goes_on_knows_how_long_trials_take(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_questions: None
) -> None:
    """Steps of ten seconds at least, by the clock of the first process."""
    given, clock, asked = settings(tiny_model, talk, **SHORT), time.monotonic, itertools.count()
    with monkeypatch.context() as slow:
        slow.setattr(tune.time, "monotonic", lambda: clock() + 10 * next(asked))
        assert tune.tune(given, tmp_path / "study", trials=1).best
    minute = tune.tune(given, tmp_path / "study", trials=2, hours=1 / 60)
    assert [trial.state for trial in minute.trials] == ["done", "waiting"] and "would take longer" in minute.ended
    day = tune.tune(given, tmp_path / "study", trials=2, hours=24)
    assert {trial.state for trial in day.trials} <= {"done", "pruned"}


class Until(Watcher):
    """The time is up after a step."""

    def __init__(self, clock: Callable[[], float], at_step: int) -> None:
        self.later, self._clock, self._at_step = 0.0, clock, at_step

    def stepped(self, metrics: StepMetrics, n_steps: int) -> None:
        self.later += 3600 * (metrics.step == self._at_step)


def test_a_trial_ends_with_the_time_and_keeps_its_newest_checkpoint(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour passes in the fourth step."""
    clock = time.monotonic
    watcher = Until(clock, 4)
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock() + watcher.later)
    given = settings(tiny_model, talk, **{"train.epochs": 400})
    found = tune.tune(given, tmp_path / "study", trials=3, hours=0.9, shown=lambda number, drawn: nullcontext(watcher))
    first = found.trials[0]
    assert (first.state, first.why) == ("pruned", "the time is up") and "would take longer" in found.ended
    assert [point.name for point in RunDir(first.run).points()] == ["step-000004"]


def test_the_time_ends_what_takes_long_between_steps_too(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hour ends while the general questions are answered, which would take LONG."""
    replies, clock, later = chat.Chat.replies, time.monotonic, [0.0]

    def slow(self: chat.Chat, talks: Any, **options: Any) -> Any:
        if options.get("max_tokens") == general.TOKENS:
            later[0] = 3600
            signal.setitimer(signal.ITIMER_REAL, 0.1, 1)  # it was set by a clock that did not know of this hour
            until = clock() + LONG
            while clock() < until:
                time.sleep(0.01)
        return replies(self, talks, **options)

    monkeypatch.setattr(chat.Chat, "replies", slow)
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock() + later[0])
    given = settings(tiny_model, talk, **SHORT)
    found = tune.tune(given, tmp_path / "study", trials=1, hours=1)
    assert [trial.state for trial in found.trials] == ["waiting"] and rundir.is_whole(found.trials[0].run / "adapter")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    monkeypatch.undo()
    steps = (found.trials[0].run / "metrics.jsonl").read_bytes()
    found = tune.tune(given, tmp_path / "study", trials=1)
    assert [trial.state for trial in found.trials] == ["done"]
    assert (found.trials[0].run / "metrics.jsonl").read_bytes() == steps


# --- going on ---------------------------------------------------------------------------------------------------------


def test_the_same_command_goes_on_and_begins_nothing_twice(
    undisturbed_study: Study, tiny_model: Path, talk: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    command = ["tune", *flags_of(tiny_model, talk), "--out", out]
    first = tunesmith(*command, "--trials", "1")
    assert first.code == 0, first.err
    again = tunesmith(*command, "--trials", "2", cwd=tmp_path)
    assert as_printed(again.json) == told(undisturbed_study), again.err
    before = {path: path.stat().st_mtime_ns for path in (out / "trials").rglob("*")}
    once_more = tunesmith(*command, "--trials", "2")
    assert once_more.code == 0 and as_printed(once_more.json) == as_printed(again.json)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "trials").rglob("*")}
    for ended in (first, again, once_more):
        assert not re.search("optuna|warning", ended.err, re.I)
    answer = again.json
    assert answer["best"]["run"] == str(out / "trials" / f"{answer['best']['number']:04}")
    assert answer["recipe"] == str(out / "best.yaml") and answer["interrupted"] is False
    assert f"tunesmith train {out / 'best.yaml'}" in again.err


def wait_until(happened: Callable[[], bool], *processes: Forked) -> None:
    deadline = time.monotonic() + LONG
    while not happened():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


def running(out: Path, trial: int, steps: int, process: Forked) -> None:
    metrics = out / "trials" / f"{trial:04}" / "metrics.jsonl"
    wait_until(lambda: len(rundir.read_lines(metrics)) >= steps, process)


@pytest.mark.parametrize("how", cases([signal.SIGKILL, signal.SIGINT], [signal.SIGINT].__contains__))
def test_a_study_that_was_stopped_ends_as_one_that_was_not(
    undisturbed_study: Study, tiny_model: Path, talk: Path, tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "study"
    command = ["tune", *flags_of(tiny_model, talk), "--out", out, "--trials", "2"]
    process = start(*command, program=FEW)
    running(out, 1, 4, process)
    process.send_signal(how)
    printed, said = process.communicate(timeout=LONG)
    if how != signal.SIGKILL:
        assert process.returncode == 130, said
    if how == signal.SIGINT:
        assert json.loads(printed)["interrupted"] and [t["state"] for t in json.loads(printed)["trials"]] == [
            "done",
            "waiting",
        ]
    ended = tunesmith(*command)
    assert ended.code == 0, ended.err
    assert as_printed(ended.json) == told(undisturbed_study)
    for trial in undisturbed_study.trials:
        adapter = Path("adapter", "adapter_model.safetensors")
        run = out / "trials" / trial.run.name
        assert (run / adapter).read_bytes() == (trial.run / adapter).read_bytes()
        assert [line["step"] for line in rundir.read_lines(run / "metrics.jsonl")] == [
            line["step"] for line in rundir.read_lines(trial.run / "metrics.jsonl")
        ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_a_study_all_the_same(
    tiny_model: Path, talk: Path, tmp_path: Path, few_questions: None
) -> None:
    class Dropped:
        """What is raised while it goes is only printed, as in any finalizer."""

        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    found = tune.tune(
        settings(tiny_model, talk, **SHORT), tmp_path / "study", trials=3, told=lambda study, trial: Dropped() and None
    )
    assert found.interrupted and [trial.state for trial in found.trials] == ["done"]


def test_half_a_line_in_the_journal_is_cut_off_and_a_damaged_one_is_named(
    undisturbed_study: Study, tiny_model: Path, talk: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    shutil.copytree(undisturbed_study.path, out)
    journal = out / "journal.jsonl"
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    found = tune.tune(settings(tiny_model, talk), out, trials=2)
    assert told(found) == told(undisturbed_study) and journal.read_bytes().startswith(whole + b'{"op_code":0')
    journal.write_bytes(whole.replace(b'{"op_code":5', b'\0\0"op_code":5', 1))
    with pytest.raises(RunError, match=r"journal\.jsonl: found a damaged line"):
        tune.tune(settings(tiny_model, talk), out, trials=3)


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"train.seed": 1}, "another state of train.seed"), ({"data.path": "other.jsonl"}, "another state of the data")],
)
def test_a_study_with_another_recipe_or_data_is_refused(
    undisturbed_study: Study, tiny_model: Path, talk: Path, tmp_path: Path, flags: dict[str, Any], named: str
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(talk.read_text() * 2)
    if "data.path" in flags:
        flags = {"data.path": str(other)}
    with pytest.raises(RunError, match=named):
        tune.tune(settings(tiny_model, talk, **flags), undisturbed_study.path, trials=3)


def test_a_folder_of_something_else_is_refused(undisturbed_study: Study, tiny_model: Path, talk: Path) -> None:
    for folder in (undisturbed_study.trials[0].run, undisturbed_study.path / "trials", talk):
        with pytest.raises(RunError, match="Choose another `out`"):
            tune.tune(settings(tiny_model, talk), folder, trials=3)


# --- several processes ------------------------------------------------------------------------------------------------


@contextmanager
def ended_in_the_end(processes: list[Forked]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def test_two_processes_take_part_in_one_study_and_each_trial_is_trained_once(
    tiny_model: Path, talk: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    one_step = {**SHORT, "train.examples_per_step": 64}  # an epoch
    command = ["tune", *flags_of(tiny_model, talk, **one_step), "--out", out, "--trials", "1000"]
    processes: list[Forked] = []
    with ended_in_the_end(processes):
        processes.append(start(*command, "--join", program=FEW))
        running(out, 0, 1, processes[0])
        alone = tunesmith(*command)
        assert alone.code == 2 and "another process at work in it" in " ".join(alone.err.split())
        processes.append(start(*command, "--join", program=FEW))
        wait_until(lambda: len(finishers(out)) == 2, *processes)
        processes[1].kill()
        processes[1].communicate()
        processes[0].send_signal(signal.SIGINT)
        assert processes[0].wait(LONG) == 130
    begun = sum(line["op_code"] == 4 for line in rundir.read_lines(out / "journal.jsonl"))  # not each has a folder
    ended = tunesmith(*command[:-1], str(begun))
    assert ended.code == 0, ended.err
    assert [trial["number"] for trial in ended.json["trials"]] == [*range(begun)]
    assert {trial["state"] for trial in ended.json["trials"]} <= {"done", "pruned"}
    for trial in ended.json["trials"]:
        lines = rundir.read_lines(Path(trial["run"]) / "metrics.jsonl")
        assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
    keys = [json.dumps(trial["settings"]) for trial in ended.json["trials"]]
    assert len(set(keys)) == len(keys)


def finishers(out: Path) -> set[str]:
    """Who has finished a trial, by the journal."""
    at: dict[int, str] = {}
    done = set[str]()
    for line in rundir.read_lines(out / "journal.jsonl"):
        if "worker" in line.get("user_attr", {}):
            at[line["trial_id"]] = line["user_attr"]["worker"]
        if line["op_code"] == 6 and line["state"] == 1:
            done.add(at[line["trial_id"]])
    return done


def test_processes_of_one_training_are_no_study(
    tiny_model: Path, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="join=True"):
        tune.tune(settings(tiny_model, talk), tmp_path / "study")


# --- what is said -----------------------------------------------------------------------------------------------------


def test_nothing_held_out_is_refused(tiny_model: Path, talk: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="hold_out"):
        tune.tune(settings(tiny_model, talk, **{"eval.hold_out": 0}), tmp_path / "study")


def test_without_optuna_it_says_in_one_sentence_what_to_install(tiny_model: Path, talk: Path) -> None:
    code = "import sys; sys.modules['optuna'] = None\nfrom tunesmith import cli\nsys.argv[0] = 'tunesmith'\ncli.main()"
    ended = script(code, "tune", *flags_of(tiny_model, talk))
    assert ended.code == 2 and "pip install 'tunesmith[tune]'" in ended.err and "Traceback" not in ended.err


def test_the_page_shows_all_trials_and_obeys_none_of_their_words(tmp_path: Path) -> None:
    names = {"train.learning_rate": 1e-4, "train.epochs": 3, "lora.r": 8}
    trials = tuple(
        Trial(n, tmp_path / "trials" / f"{n:04}", {**names, "lora.r": 8 + n}, state, loss, asked, asked == 30, 9.0, why)
        for n, (state, loss, asked, why) in enumerate(
            [
                ("done", 2.5, 50, ""),
                ("done", 2.25, 51, ""),
                ("done", 1.125, 30, ""),
                ("pruned", 4.5, None, f"<script>alert(1)</script> {tmp_path}/trials/x"),
                ("waiting", None, None, ""),
            ]
        )
    )
    study = Study(tmp_path, "<b>rows</b>-tiny", 9, trials, 52, "lora:\n  r: 9  # </pre><script>\n")
    write_page(study)
    page = (tmp_path / "tune.html").read_text()
    assert "<script>" not in page and "<b>rows" not in page and str(tmp_path) not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<circle") == 3 * 4 and page.count('class="best"') == 3 + 1
    assert "The best is 0001, with a held-out loss of 2.250; that of the recipe as it stands is 2.500" in page
    for words in ("4.500", "2.250", "waiting", "4 of 9 trials have ended"):
        assert words in page


def test_the_page_of_a_study_without_trials_can_be_written(tmp_path: Path) -> None:
    write_page(Study(tmp_path, "rows", 9, (), None, ""))
    assert "0 of 9 trials" in (tmp_path / "tune.html").read_text()


def test_chance_is_of_the_number_of_the_trial_alone() -> None:
    assert len({tune._seed(seed, number) for seed in range(20) for number in range(100)}) == 2000
    assert all(0 <= tune._seed(2**32 - 1, number) < 2**32 for number in random.Random(0).sample(range(10**6), 50))
